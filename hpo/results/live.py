"""Serves the report of a run to a browser on this machine, drawn again as the search goes on."""

import contextlib
import getpass
import http.server
import secrets
import socket
import threading
from collections.abc import Callable

REFRESH = 20  # seconds after which the browser asks for the page again
TIMEOUT = 300  # seconds that a browser may take for its request and the answer, over a slow tunnel


class Handler(http.server.BaseHTTPRequestHandler):
    """Answers with the page for the path that has the token, and with 404 for all others."""

    timeout = TIMEOUT
    path_of_page: str
    draw: Callable[[], str]

    def do_GET(self) -> None:
        """Answers one request."""
        if not secrets.compare_digest(self.path.encode(), self.path_of_page.encode()):
            self.send_error(404)
            return
        try:
            content = self.draw().encode()
            status, headers = 200, {}
        except Exception as error:  # such as a run folder that was removed: the browser asks again
            content, status, headers = f"no report: {error!r}".encode(), 500, {"Refresh": REFRESH}
        headers |= {"Content-Type": "text/html; charset=utf-8" if status == 200 else "text/plain; charset=utf-8"}
        headers |= {"Content-Length": len(content), "Cache-Control": "no-store", "Referrer-Policy": "no-referrer"}
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, str(value))
        self.end_headers()
        with contextlib.suppress(ConnectionError):  # the browser has left
            self.wfile.write(content)

    def log_message(self, *_) -> None:
        """Logs nothing."""


def serve(draw: Callable[[], str]) -> None:
    """Serves a page on a free port of 127.0.0.1 until Ctrl-C. Other users of the machine do not know its address.

    Args:
        draw: returns the page as HTML. It is called for each request, one at a time.
    """
    lock = threading.Lock()

    def draw_alone(_) -> str:
        with lock:
            return draw()

    path = f"/{secrets.token_urlsafe(16)}"
    handler = type("PageHandler", (Handler,), {"path_of_page": path, "draw": draw_alone})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        port, host = server.server_address[1], socket.gethostname()
        print(f"http://127.0.0.1:{port}{path}   (Ctrl-C ends it)")
        print(f"from another machine, first: ssh -N -L {port}:127.0.0.1:{port} {getpass.getuser()}@{host}", flush=True)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            pass

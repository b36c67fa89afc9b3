"""Serves the report of a run to a browser on this machine, drawn again as the search goes on."""

import getpass
import http.server
import secrets
import socket
import threading
from collections.abc import Callable

REFRESH = 20  # seconds after which the browser asks for the page again
TIMEOUT = 30  # seconds that a browser may take for its request


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
        except (OSError, ValueError, KeyError) as error:  # such as a run folder that was removed
            self.send_error(500, explain=str(error))
            return
        self.send_response(200)
        headers = {"Content-Type": "text/html; charset=utf-8", "Content-Length": len(content)}
        for name, value in (headers | {"Cache-Control": "no-store", "Referrer-Policy": "no-referrer"}).items():
            self.send_header(name, str(value))
        self.end_headers()
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

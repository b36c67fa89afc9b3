"""What the Slurm scripts print, and the tables in docs/slurm.md that say what to do about it.

A new message fails the first test until it has a row there, or is one of NEWS.
"""

import re

import pytest

from conftest import ROOT

SCRIPTS = ("head_node.slurm", "worker_node.slurm", "hpo/cluster/slurm.sh", "hpo/cluster/head.sh")
CALL = re.compile(r"""(?<![\w/.-])(?:(?:log|why=|die (?:\d+|"\$1")) ?|echo (?=.head_node\.slurm))(["'])""")
# The user need not act: what has been done, and where it is.
NEWS = (
    "job … on …", "Ray is up at", "  ssh -N -L", "  then http://localhost", "joined …: …", "given back: no trial needs",
    "the head says that it is over", "ended after … s, exit code", "left after … s, exit code",
)  # fmt: skip
# A sentence from elsewhere, and the row for it:
PASSED_ON = {
    "head_node.slurm: error: $2": None,  # `die` itself, and below `log` in `die`
    "$2": None,
    "worker $what has a broken GPU on $rest": "worker job … has a broken GPU on <node>: …",
    "worker $what cannot use $rest": "worker job … cannot use <node>: …",
    "worker $what $word $rest": "worker job … refused <node>: …",
    "$why": None,  # the sentences that it stands for are found where it is set
    "$checked": "worker job … refused <node>: …",  # by hpo.cluster.gpu_check
    '$(< "$rendezvous/bad-$id")': "worker job … has a broken GPU on <node>: …",  # by hpo.cluster.watchdogs
    'waiting in the queue:${waiting[$reason]} ($reason: $(in_words "$reason"))': "waiting in the queue: … (Resources)",
    "${problem%%$'\\n'*}": "./cluster.env: line …: syntax error",  # by bash
}
CLOSING = {"(": ")", "{": "}"}


def read(text: str, start: int, quote: str) -> tuple[str, str]:
    """A string of bash that begins at `start`: as it is written, and with … for each variable and command."""
    i, constant = start, ""
    while text[i] != quote:
        if text[i] == "$" and quote == '"' and (match := re.match(r"\$(\w+|[({])", text[i:])):
            i += match.end()
            constant += "…"
            if match[1] in CLOSING:
                depth = 1
                while depth:
                    depth += (text[i] == match[1]) - (text[i] == CLOSING[match[1]])
                    i += 1
        else:
            constant += text[i]
            i += 1
    return text[start:i], constant


def messages(text: str) -> list[tuple[str, str]]:
    """The messages of a script, see `read`."""
    return [read(text, call.end(), call[1]) for call in CALL.finditer(text)]


def phrases() -> list[str]:
    """What the first columns of the tables have in backticks."""
    section = (ROOT / "docs" / "slurm.md").read_text().partition("\n## What the log says, and what to do\n")[2]
    rows = re.findall(r"^\| (`.*?) \|", section.partition("\n## ")[0], re.MULTILINE)
    return [phrase for row in rows for phrase in re.findall("`(.+?)`", row)]


def has(text: str, phrase: str) -> bool:
    """Whether a text has all parts of a phrase between … or <…>, in their order."""
    parts = map(re.escape, re.split("…|<.*?>", phrase))
    return re.search(".*".join(parts), text) is not None


def without_row(text: str) -> list[str]:
    """The messages of a script that neither a row nor this file knows."""
    known = [*phrases(), *NEWS]
    found = [message for message in messages(text) if message[0] not in PASSED_ON]
    return [constant for _, constant in found if not any(has(constant, phrase) for phrase in known)]


@pytest.mark.parametrize("script", SCRIPTS)
def test_each_message_of_the_slurm_scripts_has_its_row(script):
    text = (ROOT / script).read_text()
    assert len(messages(text)) > 4 and without_row(text) == []
    rows = [PASSED_ON[message] for message, _ in messages(text) if PASSED_ON.get(message)]
    assert set(rows) <= set(phrases())


def test_a_new_message_without_a_row_is_found():
    new = 'log "the $what is on fire"\n[[ $x ]] || die 1 "no $(cat "$file") left in ${here:-there}"\nwhy=\'it rains\'\n'
    assert without_row(new) == ["the … is on fire", "no … left in …", "it rains"]
    assert without_row('log "$anything"\n') == ["…"]


def test_each_row_has_a_message():
    """None is left of a message that is gone."""
    constants = [constant for script in SCRIPTS for _, constant in messages((ROOT / script).read_text())]
    rows = [p for p in phrases() if p not in PASSED_ON.values() and not p.startswith(("waiting in the queue: ", "("))]
    assert len(rows) > 30 and [p for p in rows if not any(has(constant, p) for constant in constants)] == []


def test_each_reason_of_slurm_has_its_row():
    """The reasons why a job waits, which the log puts in plain words."""
    words = (ROOT / "hpo/cluster/head.sh").read_text().partition("\nin_words() {")[2].partition("\n}")[0]
    reasons = [reason for case in re.findall(r"^\t(\w.*?)\) echo", words, re.MULTILINE) for reason in case.split(" | ")]
    rows = " ".join(phrases())
    shown = {reason: f"({reason.replace('?', ' ').replace('*', '…')})" for reason in reasons}
    assert len(reasons) > 9 and [reason for reason in reasons if shown[reason] not in rows] == []

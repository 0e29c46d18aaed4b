"""No word of others is obeyed by the terminal: not in messages, warnings, logs, bars, nor in what argparse quotes."""

from __future__ import annotations

import logging
import re
import sys
import warnings

import pytest

from soul.cli import main
from soul.console import fail, progress_bars, safe_terminal, say, warn
from soul.visible import clean, hides, message, one_line

EVIL = "[bold]x[/bold] [/] :bomb: \x1b]0;title\x07\x1b[2J\x9b31m \u202egnp\u2066.\r\nerror: forged\x00\udcff"
STEERS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def shown(capsys: pytest.CaptureFixture[str]) -> str:
    out, err = capsys.readouterr()
    assert not STEERS.search(out + err), ascii(out + err)
    return out + err


@pytest.mark.parametrize("show", [say, fail, warn, lambda text: say(text, lead="note:", style="bold")])
def test_a_message_is_one_line_of_text(show, capsys):
    show(EVIL)
    text = shown(capsys)
    assert text.count("\n") == 1
    assert "[bold]x[/bold] [/] :bomb:" in text
    assert "␛]0;title␇␛[2J⟨U+009B⟩31m ⟨U+202E⟩gnp⟨U+2066⟩. error: forged␀\ufffd" in text


def test_warnings_and_logs_are_shown_like_all_else(capsys):
    before = warnings.showwarning
    with safe_terminal():
        warnings.simplefilter("always")
        warnings.warn(EVIL, stacklevel=1)
        logging.getLogger("soul.overlaps").warning("said %s", EVIL)
    text = shown(capsys)
    assert text.count("warning:") == 2
    assert text.count("forged") == 2
    assert warnings.showwarning is before


def test_bars_name_what_they_are_of(capsys):
    with progress_bars() as tick:
        tick(EVIL, 1, 2)
    # rich moves its own cursor; only the name of the bar is ours
    assert "[bold]x[/bold]" in capsys.readouterr().err


@pytest.mark.parametrize("words", [["forget\x1b[2J"], ["unlearn", "--\x1b]0;x\x07"], ["list", EVIL.replace("\0", "")]])
def test_what_argparse_quotes(words, capsys):
    with pytest.raises(SystemExit) as left:
        main(words)
    assert left.value.code == 2
    assert shown(capsys).count("error: ") >= 1


def test_a_name_that_is_not_utf8(capsys):
    with pytest.raises(SystemExit) as left:
        main(["show", "label=\udcff"])
    assert left.value.code == 2
    assert "is not UTF-8 text" in shown(capsys)


def test_a_setting_is_quoted_and_not_obeyed(capsys):
    assert main(["show", "training.epochs=\x1b[2J[red]"]) == 2
    assert "training.epochs" in shown(capsys)
    assert main(["show", "label=a\u202eb\x1b[31m"]) == 0
    assert 'label: "a\\u202Eb\\e[31m"' in shown(capsys)


def test_a_terminal_that_knows_no_unicode(capsys):
    with safe_terminal():
        assert sys.stdout.errors == "backslashreplace"


def test_texts_of_megabytes_are_cut_with_a_note():
    text = "word \x1b" * 2_000_000
    for cut in (clean, one_line, message):
        short = cut(text)
        assert len(short) < 9000
        assert re.search(r"… \([\d,]{9,} more characters\)", short)
        assert short.endswith("word ␛" if cut is message else ")"), "of a message the end is what to do"


def test_hides():
    assert not hides("plain\n\ttext é 日本 👩‍🚀")
    assert all(hides(c) for c in ("\x1b", "\x7f", "\x9b", "\u202e", "\u2028", "\ufeff", "\ud800", "\u00ad"))

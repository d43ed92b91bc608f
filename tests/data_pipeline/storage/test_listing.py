"""Pages by which web servers list a folder."""

from __future__ import annotations

import pytest

from data_pipeline.storage.listing import linked_names

URL = "http://host/a%20corpus/web"
PAGES = {
    "python": b'<li><a href="a.tar">a.tar</a></li><li><a href="b.tar">b.tar</a></li>',
    "nginx": b'<a href="../">../</a>\n<a href="b.tar">b.tar</a> 1-Jan 9K\n<a href="a.tar">a..&gt;',
    "apache": (
        b'<a href="?C=N;O=D">Name</a><a href="/a%20corpus/">Up</a><img src="/icons/c.gif">'
        b'<a href="a.tar">a.tar</a><A HREF="b.tar">b.tar</A><a href="a.tar?C=M">other</a>'
    ),
    "whole addresses": (
        b"<a href=\"http://host/a%20corpus/web/a.tar\">x</a><a href='/a%20corpus/web/b.tar'>x</a>"
        b'<a href="https://host/a%20corpus/web/b.tar">x</a><a href=./a.tar>x</a>'
    ),
    "other places": (
        b'<a href="a.tar">x</a><a href="b.tar">x</a><a href="deeper/c.tar">x</a>'
        b'<a href="http://elsewhere/a%20corpus/web/c.tar">x</a><a href="deeper/">x</a>'
        b'<a href="#c.tar">x</a><a href="http://[c.tar">x</a><a href="mailto:c.tar">x</a>'
    ),
}


@pytest.mark.parametrize("page", PAGES)
@pytest.mark.parametrize("url", [URL, URL + "/", URL.replace("host", "me:secret@host")])
def test_the_files_of_the_folder_are_found(page: str, url: str) -> None:
    assert linked_names(PAGES[page], url) == ["a.tar", "b.tar"]


def test_a_page_without_links_lists_nothing() -> None:
    assert not linked_names(b"\x00\xff href href = '", URL)
    assert linked_names(b"href='caf%C3%A9.tar'", URL) == ["caf\u00e9.tar"]

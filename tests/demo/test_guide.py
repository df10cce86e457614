"""The text that the demo prints; that its commands work is tested in test_run.py."""

import pytest

from inference_api.demo.guide import base_url, guide


def test_the_guide_says_that_the_models_are_fakes() -> None:
    text = guide("http://127.0.0.1:8000", 40, 1234, "/tmp/demo")
    assert "are demo models: programs that repeat what you say at\n40 tokens a second, without a GPU" in text
    assert "kill 1234" in text.splitlines()


@pytest.mark.parametrize(
    ("host", "url"),
    [
        ("127.0.0.1", "http://127.0.0.1:80"),
        ("0.0.0.0", "http://127.0.0.1:80"),
        ("::", "http://[::1]:80"),
        ("localhost", "http://localhost:80"),
    ],
)
def test_a_server_is_reached_where_it_listens(host: str, url: str) -> None:
    assert base_url(host, 80) == url

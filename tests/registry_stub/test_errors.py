import json

from registry_stub.errors import Refused, render


def test_an_error_has_every_key_of_the_envelope() -> None:
    response = render(Refused(422, "validation_error", "Wrong.", param="name", headers={"X-A": "b"}))
    detail = {"message": "Wrong.", "type": "invalid_request_error", "param": "name", "code": "validation_error"}
    assert json.loads(bytes(response.body)) == {"error": detail}
    assert (response.status_code, response.headers["x-a"]) == (422, "b")


def test_our_own_failures_are_server_errors() -> None:
    assert json.loads(bytes(render(Refused(503, "x", "y")).body))["error"]["type"] == "server_error"


def test_a_message_about_thousands_of_mistakes_is_cut() -> None:
    assert len(render(Refused(422, "x", "wrong; " * 100_000)).body) < 2200

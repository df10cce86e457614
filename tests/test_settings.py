"""Configuration: every variable works, and what cannot be used is refused by the variable's name."""

from ipaddress import ip_network
from pathlib import Path
from typing import Any, Self

import pytest
from pydantic import Field, SecretStr, ValidationError, model_validator

from inference_api.app import GROUPS
from inference_api.settings import DEFAULT_CATALOGUE, PREFIX, Group, Settings, SettingsError, fields_of, load_settings

# A value that is not the default, for every setting.
VALUES: dict[str, tuple[str, Any]] = {
    "host": ("0.0.0.0", "0.0.0.0"),
    "port": ("9000", 9000),
    "ops_port": ("9090", 9090),
    "catalogue": ("/etc/c.yaml", Path("/etc/c.yaml")),
    "registry_url": ("https://registry:8081/", "https://registry:8081"),
    "registry_token": ("s3cret\n", SecretStr("s3cret")),
    "registry_refresh": ("0.5", 0.5),
    "discovery": ("endpointslices", "endpointslices"),
    "registry_required": ("on", "on"),
    "discovery_interval": ("2.5", 2.5),
    "load_signal_interval": ("5", 5.0),
    "engine_interval": ("2.5", 2.5),
    "trusted_proxies": ("10.0.0.0/8, ::1", frozenset({ip_network("10.0.0.0/8"), ip_network("::1")})),
    "policy": ("/etc/policy.yaml", "/etc/policy.yaml"),
    "policy_cache": ("/var/cache/policy", Path("/var/cache/policy")),
    "key_pepper": (f"{'n' * 32},{'o' * 32}", SecretStr(f"{'n' * 32},{'o' * 32}")),
    "auth": ("keys", "keys"),
    "limits": ("redis", "redis"),
    "limits_on_failure": ("closed", "closed"),
    "limits_share": ("3", 3),
    "redis_url": ("rediss://user:s3cret@redis:6380/1", "rediss://user:s3cret@redis:6380/1"),
    "usage": ("registry", "registry"),
    "cors_origins": (
        "https://a.example, http://localhost:3000",
        frozenset({"https://a.example", "http://localhost:3000"}),
    ),
    "realtime": ("on", "on"),
    "currency": ("EUR", "EUR"),
    "cache_bytes": ("1048576", 1_048_576),
    "report_interval": ("2.5", 2.5),
    "usage_spool": ("/var/spool/usage", Path("/var/spool/usage")),
    "connect_timeout": ("1", 1.0),
    "first_byte_timeout": ("2", 2.0),
    "idle_timeout": ("3", 3.0),
    "total_timeout": ("4", 4.0),
    "stream_timeout": ("5", 5.0),
    "header_timeout": ("6", 6.0),
    "body_timeout": ("7", 7.0),
    "write_stall_timeout": ("8", 8.0),
    "keepalive_timeout": ("9", 9.0),
    "max_connection_age": ("600", 600.0),
    "upstream_keepalive": ("1.5", 1.5),
    "max_body_bytes": ("1024", 1024),
    "max_buffered_bytes": ("100000000", 100_000_000),
    "max_in_flight": ("10", 10),
    "max_attempts": ("3", 3),
    "retry_budget": ("0", 0.0),
    "retry_on_status": ("502, 504", frozenset({502, 504})),
    "forward_headers": ("X-Vllm-Priority,x-b", frozenset({"x-vllm-priority", "x-b"})),
    "breaker_failures": ("1", 1),
    "breaker_cooldown": ("0.1", 0.1),
    "health_interval": ("11", 11.0),
    "health_timeout": ("12", 12.0),
    "drain_delay": ("13", 13.0),
    "drain_timeout": ("14", 14.0),
    "validation_status": ("400", "400"),
    "log_level": ("debug", "debug"),
    "log_format": ("console", "console"),
}


def load(**values: str) -> Settings:
    return load_settings({PREFIX + name.upper(): value for name, value in values.items()}, GROUPS)


def refusal(**values: str) -> str:
    with pytest.raises(SettingsError) as caught:
        load(**values)
    return str(caught.value)


@pytest.mark.parametrize("name", fields_of(GROUPS))
def test_a_variable_sets_its_setting(name: str) -> None:
    text, value = VALUES[name]

    assert read(load(**{name: text}), name) == value
    assert read(load(), name) == fields_of(GROUPS)[name].default != value


def read(settings: Settings, name: str) -> object:
    """A setting of the core, or of a feature's group."""
    group = next((group for group in GROUPS if name in group.model_fields), None)
    return getattr(settings if group is None else settings.of(group), name)


def test_the_defaults_are_those_of_the_design() -> None:
    settings = load_settings({})

    assert (settings.host, settings.port, settings.ops_port, settings.registry_url) == ("127.0.0.1", 8000, None, None)
    assert (settings.max_body_bytes, settings.max_in_flight, settings.max_attempts) == (33554432, 1000, 2)
    assert (settings.retry_on_status, settings.forward_headers) == (frozenset({503}), frozenset())
    assert settings.catalogue == DEFAULT_CATALOGUE
    assert DEFAULT_CATALOGUE.is_file()


def test_every_setting_says_what_it_is_for() -> None:
    assert all(field.description for field in fields_of(GROUPS).values())


def test_the_environment_of_the_process_is_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INFERENCE_API_PORT", "9001")
    monkeypatch.setenv("INFERENCE_APIARY", "not ours")

    assert load_settings().port == 9001


def test_names_may_be_in_lower_case() -> None:
    assert load_settings({"inference_api_port": "9001"}).port == 9001


@pytest.mark.parametrize(
    ("name", "meant"), [("PROT", "PORT"), ("MAX_BODY_SIZE", "MAX_BODY_BYTES"), ("IDLE_TIMEOUTS", "IDLE_TIMEOUT")]
)
def test_an_unknown_variable_is_named_with_what_may_be_meant(name: str, meant: str) -> None:
    message = f"INFERENCE_API_{name}: there is no such setting; did you mean INFERENCE_API_{meant}?"

    assert refusal(**{name: "1"}) == message


def test_a_prefix_in_common_is_no_resemblance() -> None:
    assert "did you mean" not in refusal(FOO="1")


def test_a_port_that_kubernetes_has_set_is_told_with_the_way_out() -> None:
    message = refusal(port="tcp://10.0.0.1:8000")

    assert message.startswith("INFERENCE_API_PORT='tcp://10.0.0.1:8000': must be a whole number; ")
    assert "`enableServiceLinks: false`" in message


def test_a_variable_that_resembles_nothing_points_at_the_list() -> None:
    assert refusal(zzzzzzzzzzzzzzzzzzzzzzzzzzzzzzzzzzz="1").endswith("`inference-api serve --help` lists the variables")


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        ("port", "http", "must be a whole number"),
        ("port", "0", "greater than or equal to 1"),
        ("port", "65536", "less than or equal to 65535"),
        ("port", "", "must be a whole number"),
        ("port", "8000.5", "must be a whole number"),
        ("ops_port", "-1", "greater than or equal to 1"),
        ("connect_timeout", "0", "greater than 0"),
        ("connect_timeout", "nan", "finite number"),
        ("stream_timeout", "inf", "finite number"),
        ("idle_timeout", "2s", "must be a number"),
        ("max_attempts", "4", "less than or equal to 3"),
        ("max_body_bytes", "0", "greater than or equal to 1"),
        ("max_buffered_bytes", "33554431", "INFERENCE_API_MAX_BODY_BYTES=33554432 would not fit"),
        ("ops_port", "8000", "is also INFERENCE_API_PORT; set it to another port"),
        ("host", "", "at least 1 character"),
        ("drain_delay", "inf", "finite"),
        ("forward_headers", "accept-encoding", "never forwarded"),
        ("registry_url", "http://h:notaport", "its port must be a number"),
        ("registry_url", "http://h:99999", "its port must be a number"),
        ("registry_url", "http://h/?x=1", "without ? and #"),
        ("retry_budget", "1.1", "less than or equal to 1"),
        ("drain_delay", "-1", "greater than or equal to 0"),
        ("log_level", "loud", "must be one of debug, info, warning, error"),
        ("log_format", "xml", "must be one of json, console"),
        ("registry_url", "registry:8081", "must be an http:// or https:// URL"),
        ("registry_url", "ftp://registry", "must be an http:// or https:// URL"),
        ("registry_url", "http://", "must be an http:// or https:// URL"),
        ("registry_url", "http://[::1", "Invalid IPv6 URL"),
        ("cors_origins", "https://app.example/", "'https://app.example/' is no origin"),
        ("cors_origins", "app.example", "such as https://app.example"),
        ("cors_origins", "https://a.example,*", "`*` is every origin; give it alone"),
        ("cors_origins", "https://app.example:443", "'https://app.example:443' is no origin"),
        ("realtime", "yes", "must be one of off, on"),
        ("cors_origins", "null", "'null' is no origin"),
        ("retry_on_status", "503,500", "500 cannot be retried safely; use some of 429, 502, 503, 504"),
        ("retry_on_status", "all", "must be a whole number"),
        ("forward_headers", "x-a,x b", "'x b' is not a header name"),
        ("forward_headers", "x-ü", "'x-ü' is not a header name"),
        ("forward_headers", "x:1", "'x:1' is not a header name"),
        ("forward_headers", "Authorization", "'authorization' is set by the router and is never forwarded"),
        ("forward_headers", "cookie", "'cookie' is set by the router"),
        ("forward_headers", "Content-Length", "'content-length' is set by the router"),
        ("forward_headers", "transfer-encoding", "'transfer-encoding' is set by the router"),
        ("forward_headers", "X-Forwarded-For", "'x-forwarded-for' is set by the router"),
    ],
)
def test_an_invalid_value_is_named_with_the_reason(name: str, value: str, reason: str) -> None:
    message = refusal(**{name: value})

    assert message.startswith(f"INFERENCE_API_{name.upper()}={value!r}: ")
    assert reason in message
    assert "\n" not in message


@pytest.mark.parametrize(
    "url", ["postgres://user:secret@h/x", "user:secret@h", "http://user:secret@h:x", "//u:secret@"]
)
def test_a_password_in_a_url_is_not_shown(url: str) -> None:
    message = refusal(registry_url=url)

    assert message.startswith("INFERENCE_API_REGISTRY_URL=")
    assert "***@" in message
    assert "secret" not in message


@pytest.mark.parametrize("token", ["", " ", "s3 cret", "s3crét", "s3cret\rx-evil: 1"])
def test_a_token_that_no_header_can_carry_is_refused_and_not_shown(token: str) -> None:
    message = refusal(registry_token=token)

    assert message.startswith("INFERENCE_API_REGISTRY_TOKEN='***': must be one word of ASCII characters")
    assert "s3" not in message


def test_a_token_is_not_in_what_settings_look_like() -> None:
    assert "s3cret" not in repr(load(registry_token="s3cret"))


class Door(Group):
    key_pepper: SecretStr | None = Field(default=None, min_length=8)
    sized: int = 0


class Window(Group):
    panes: int = 1

    @model_validator(mode="after")
    def _enough(self) -> Self:
        if not self.panes:
            raise ValueError(f"{PREFIX}PANES='0': set it to at least 1")
        return self


def test_every_group_says_what_is_wrong_with_it_and_no_secret() -> None:
    environ = {"KEY_PEPPER": "s3cret", "SIZED": "x", "PANES": "0", "PORT": "y", "PANE": "1"}
    with pytest.raises(SettingsError) as raised:
        load_settings({PREFIX + name: value for name, value in environ.items()}, (Door, Window))

    unknown, port, pepper, sized, panes = str(raised.value).splitlines()
    assert unknown == f"{PREFIX}PANE: there is no such setting; did you mean {PREFIX}PANES?"
    assert port.startswith(f"{PREFIX}PORT='y': ")
    assert pepper.startswith(f"{PREFIX}KEY_PEPPER='***': ")
    assert sized == f"{PREFIX}SIZED='x': must be a whole number"
    assert panes == f"{PREFIX}PANES='0': set it to at least 1"


def test_each_group_gets_its_own() -> None:
    settings = load_settings({f"{PREFIX}SIZED": "3", f"{PREFIX}PANES": "2", f"{PREFIX}PORT": "1"}, (Door, Window))

    assert (settings.port, settings.of(Door).sized, settings.of(Window).panes) == (1, 3, 2)
    assert load_settings({}).of(Window).panes == 1


def test_a_value_in_a_message_is_cut() -> None:
    assert len(refusal(port="9" * 100_000)) < 300


def test_all_problems_are_told_at_once() -> None:
    lines = refusal(port="x", prot="1", idle_timeout="-1", forward_headers="host").splitlines()

    assert [line.split("=")[0].split(":")[0] for line in lines] == [
        "INFERENCE_API_PROT",
        "INFERENCE_API_PORT",
        "INFERENCE_API_IDLE_TIMEOUT",
        "INFERENCE_API_FORWARD_HEADERS",
    ]


def test_a_lower_case_variable_is_named_with_its_value() -> None:
    with pytest.raises(SettingsError, match="INFERENCE_API_PORT='http'"):
        load_settings({"inference_api_port": "http"})


@pytest.mark.parametrize(("text", "value"), [("", set()), (" , ", set()), ("503", {503}), ("429,502 ,503,504,", None)])
def test_statuses_are_a_list_with_commas(text: str, value: set[int] | None) -> None:
    assert load(retry_on_status=text).retry_on_status == (value if value is not None else {429, 502, 503, 504})


def test_settings_do_not_change() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        load().port = 1


def test_what_is_not_a_setting_is_refused_in_code_too() -> None:
    with pytest.raises(ValidationError, match="prot"):
        Settings(prot=1)  # type: ignore[call-arg]


def test_code_does_not_read_the_environment_by_itself(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("INFERENCE_API_PORT", "9001")
    monkeypatch.chdir(tmp_path)
    (tmp_path / ".env").write_text("INFERENCE_API_PORT=9002\n")

    assert Settings().port == 8000
    assert load_settings({}).port == 8000

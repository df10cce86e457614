"""Catalogues as operators and registries write them, well and badly; and the URLs that a hostile registry would try."""

import json
import time
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from inference_api.routing.catalogue import Catalogue, CatalogueError, load_catalogue, parse_catalogue
from inference_api.routing.urls import check_backend_url
from inference_api.settings import DEFAULT_CATALOGUE


def parsed(*entries: Any) -> Catalogue:
    return parse_catalogue({"models": list(entries)})


def problem(**entry: Any) -> str:
    """The sentence for an entry that is refused; a good one after it must not suffer."""
    catalogue = parsed({"name": "bad"} | entry, {"name": "good"})
    assert list(catalogue) == ["good"]
    [sentence] = catalogue.problems
    assert "\n" not in sentence
    return sentence


# The file


def test_the_packaged_catalogue_is_valid() -> None:
    catalogue = load_catalogue(DEFAULT_CATALOGUE)

    assert list(catalogue) == ["llama-3-8b", "mistral-7b", "gpt2"]
    assert catalogue.problems == []
    assert all(entry.backends and entry.hardware for entry in catalogue.values())


@pytest.mark.parametrize("suffix", [".yaml", ".yml", ".json"])
def test_yaml_and_json_say_the_same(tmp_path: Path, suffix: str) -> None:
    entry = {
        "name": "m",
        "backends": [{"url": "http://m:8000/", "weight": 2}],
        "credentials": {"env": "BACKEND_TOKEN"},
        "timeouts": {"idle": 1.5},
    }
    path = tmp_path / f"catalogue{suffix}"
    # JSON is YAML, so the same text serves both.
    path.write_text(json.dumps({"models": [entry]}))

    assert load_catalogue(path) == parsed(entry)


def test_what_an_entry_leaves_out_has_the_documented_value() -> None:
    entry = parsed({"name": "m"})["m"]

    assert (entry.version, entry.owner, entry.engine, entry.balancing) == ("1", "unknown", "vllm", "two_choices")
    assert (entry.backends, entry.aliases, entry.created) == ((), (), 0)
    assert {entry.served_model_name, entry.max_in_flight, entry.credentials, entry.hardware} == {None}
    assert entry.timeouts.idle is None


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("c.yaml", "models: [", "is not YAML: while parsing"),
        ("c.yaml", "models: !!python/object/apply:os.system [true]", "is not YAML: could not determine a constructor"),
        ("c.json", "models: []", "is not JSON: Expecting value"),
        ("c.json", "", "is not JSON: Expecting value"),
        ("c.yaml", "", "a catalogue is a mapping with a list under `models`"),
        ("c.yaml", "- name: m", "a catalogue is a mapping with a list under `models`"),
        ("c.yaml", "models: {m: {}}", "a catalogue is a mapping with a list under `models`"),
        ("c.yaml", "{models: [], modles: [], 1: 2}", "unknown key '1' beside `models`"),
        ("c.json", '{"models": [], "version": 1}', "unknown key 'version' beside `models`"),
    ],
)
def test_a_file_that_is_no_catalogue_is_refused_in_one_line(
    tmp_path: Path, name: str, content: str, reason: str
) -> None:
    path = tmp_path / name
    path.write_text(content)

    with pytest.raises(CatalogueError) as caught:
        load_catalogue(path)

    assert reason in str(caught.value)
    assert repr(str(path)) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_that_cannot_be_read_is_refused_with_the_reason(tmp_path: Path) -> None:
    binary = tmp_path / "c.yaml"
    binary.write_bytes(b"\xff\xfe\x00")

    with pytest.raises(CatalogueError, match=r"missing\.yaml' cannot be read: No such file or directory"):
        load_catalogue(tmp_path / "missing.yaml")
    with pytest.raises(CatalogueError, match="cannot be read: Is a directory"):
        load_catalogue(tmp_path)
    with pytest.raises(CatalogueError, match="cannot be read: 'utf-8' codec can't decode byte 0xff"):
        load_catalogue(binary)


@pytest.mark.parametrize("document", [None, [], "models", 5, {}, {"models": None}, {"models": {}}, {"models": "m"}])
def test_a_document_without_a_list_of_models_is_refused(document: Any) -> None:
    with pytest.raises(CatalogueError, match="a mapping with a list under `models`"):
        parse_catalogue(document)


# Entries


@pytest.mark.parametrize(
    ("entry", "sentence"),
    [
        ({"backend": []}, "model 'bad': unknown key 'backend'; did you mean 'backends'?"),
        ({"timeouts": {"ttft": 1}}, "model 'bad': timeouts: unknown key 'ttft'"),
        ({"hardware": {"cpu": 1}}, "model 'bad': hardware: unknown key 'cpu'"),
        ({"backends": [{"url": "http://x", "w": 1}]}, "model 'bad': backends.0: unknown key 'w'"),
        ({"engine": "ollama"}, "model 'bad': engine 'ollama': must be vllm, tgi, sglang, llamacpp or openai; openai"),
        ({"balancing": "random"}, "model 'bad': balancing 'random': must be round_robin, least_in_flight"),
        ({"timeouts": {"idle": 0}}, "model 'bad': timeouts.idle 0: must be greater than 0"),
        ({"timeouts": {"total": float("inf")}}, "model 'bad': timeouts.total inf: must be a finite number"),
        ({"engine_fields": "yes"}, "model 'bad': engine_fields 'yes': must be refuse or allow"),
        ({"max_in_flight": 0}, "model 'bad': max_in_flight 0: must be greater than or equal to 1"),
        ({"backends": [{"url": "http://x", "weight": 0}]}, "backends.0.weight 0: must be greater than 0"),
        ({"backends": [{"url": "http://x", "weight": 1e9}]}, "backends.0.weight 1000000000.0: must be less than"),
        ({"backends": [{"url": "http://x", "weight": float("nan")}]}, "backends.0.weight nan: must be"),
        ({"backends": "http://x"}, "model 'bad': backends must be a list: [\"http://x\"]"),
        ({"aliases": "a2"}, "model 'bad': aliases must be a list: [a2]"),
        ({"backends": [5]}, "backends.0 must be a URL, or {url: "),
        ({"backends": [{"url": "http://x/"}, {"url": "http://x"}]}, "the same backend url is listed twice"),
        ({"backends": [{}]}, "model 'bad': backends.0.url: Field required"),
        (
            {"backends": [{"url": "http://x", "discovery": "consul"}]},
            "backends.0.discovery 'consul': must be static or",
        ),
        (
            {"backends": [{"url": "http://10.0.0.1", "discovery": "dns"}]},
            "backends.0: `discovery: dns` needs a host name",
        ),
        (
            {"backends": [{"url": "http://[::1]:8", "discovery": "dns"}]},
            "backends.0: `discovery: dns` needs a host name",
        ),
        ({"credentials": "secret"}, "model 'bad': credentials must be {env: BACKEND_...}, {file: "),
        ({"credentials": {"env": "NOPE_TOKEN"}}, "credentials.env 'NOPE_TOKEN': the name must begin with BACKEND_"),
        ({"credentials": {"env": "sk-abcdef"}}, "credentials.env: the name must begin with BACKEND_"),
        ({"credentials": {"env": "BACKEND_A B"}}, "model 'bad': credentials"),
        ({"credentials": {}}, "file: give either `env` or `file`"),
        ({"credentials": {"env": "BACKEND_A", "file": "/BACKEND_A"}}, "file: give either `env` or `file`"),
        ({"credentials": {"file": "/etc/shadow"}}, "file: the path must be absolute"),
        ({"credentials": {"file": "BACKEND_A"}}, "file: the path must be absolute"),
        ({"credentials": {"file": "/run/../BACKEND_A"}}, "file: the path must not have '.' or '..'"),
        ({"credentials": {"env": "BACKEND_A", "header": "X-Key"}}, "header: must match pattern"),
        ({"credentials": {"env": "BACKEND_A", "header": "content-length"}}, "header: the header 'content-length'"),
        (
            {"credentials": {"env": "BACKEND_A", "header": "transfer-encoding"}},
            "header: the header 'transfer-encoding'",
        ),
        ({"credentials": {"env": "BACKEND_A", "scheme": "a b"}}, "scheme: must match pattern"),
        ({"served_model_name": ""}, "model 'bad': served_model_name: must have at least 1 character"),
        ({"aliases": ["good one"]}, "model 'bad': aliases.0 'good one': no spaces"),
        ({"created": -1}, "model 'bad': created -1: must be greater than or equal to 0"),
        ({"version": None}, "model 'bad': version: must be a valid string"),
    ],
)
def test_a_bad_entry_is_refused_alone_with_a_sentence_that_names_the_key(entry: dict[str, Any], sentence: str) -> None:
    assert sentence in problem(**entry)


@pytest.mark.parametrize("raw", [None, 5, "m", [], {}, {"name": None}, {"name": ["m"]}])
def test_an_entry_without_a_name_is_told_by_its_number(raw: Any) -> None:
    catalogue = parsed({"name": "good"}, raw)

    assert list(catalogue) == ["good"]
    [sentence] = catalogue.problems
    assert sentence.startswith("model number 2: ")


def test_two_faults_of_an_entry_are_one_sentence() -> None:
    assert problem(engine="x", owner=[]).count("model 'bad'") == 1


@pytest.mark.parametrize("name", ["m", "8", "org/model", "a:b@c", "A.b_c-d", "m" * 128])
def test_a_name_may_have_slashes_and_colons(name: str) -> None:
    assert list(parsed({"name": name})) == [name]


@pytest.mark.parametrize("name", ["", "m\n", "a\nb", "m{}", '{le="1"}', "a b", "/m", "-m", "m\x1b[0m", "é", "m" * 129])
def test_a_name_that_could_break_a_line_or_a_label_is_refused(name: str) -> None:
    assert f"name {name[:64]!r}: no spaces" in problem(name=name)


def test_a_backend_may_be_its_url_alone() -> None:
    assert parsed({"name": "m", "backends": ["http://a/v1"]}) == parsed(
        {"name": "m", "backends": [{"url": "http://a"}]}
    )


@pytest.mark.parametrize(
    ("name", "text", "reason"),
    [
        ("c.yaml", "models: []\nmodels: []", "the key 'models' is given twice, in lines 1 and 2"),
        ("c.yaml", "models:\n- name: a\n  engine: tgi\n  name: b", "the key 'name' is given twice, in lines 2 and 4"),
        ("c.json", '{"models": [{"name": "a", "name": "b"}]}', "the key 'name' is given twice"),
    ],
)
def test_a_key_that_is_given_twice_is_refused(tmp_path: Path, name: str, text: str, reason: str) -> None:
    (tmp_path / name).write_text(text)

    with pytest.raises(CatalogueError, match=reason):
        load_catalogue(tmp_path / name)


def test_a_merged_key_may_be_given_again(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("models:\n- &a {name: a, engine: tgi}\n- {<<: *a, name: b}")

    assert [entry.engine for entry in load_catalogue(path).values()] == ["tgi", "tgi"]


def test_numbers_are_taken_where_text_is_due() -> None:
    catalogue = parsed({"name": 8, "version": 1.5, "owner": 7})

    assert (catalogue["8"].version, catalogue["8"].owner) == ("1.5", "7")


@pytest.mark.parametrize(
    ("first", "second", "taken"),
    [
        ({"name": "m"}, {"name": "m"}, "m"),
        ({"name": "m", "aliases": ["n"]}, {"name": "n"}, "n"),
        ({"name": "m"}, {"name": "n", "aliases": ["m"]}, "m"),
        ({"name": "m", "aliases": ["x"]}, {"name": "n", "aliases": ["x"]}, "x"),
    ],
)
def test_of_two_entries_with_one_name_the_first_stays(
    first: dict[str, Any], second: dict[str, Any], taken: str
) -> None:
    catalogue = parsed(first, second)

    assert list(catalogue) == ["m"]
    [sentence] = catalogue.problems
    assert sentence == f"model {second['name']!r}: the name {taken!r} is taken by an earlier entry"


def test_a_refused_entry_takes_no_name() -> None:
    catalogue = parsed({"name": "m", "aliases": ["x"], "engine": "none"}, {"name": "x"}, {"name": "m"})

    assert list(catalogue) == ["x", "m"]


def test_an_alias_that_repeats_its_own_name_does_no_harm() -> None:
    assert list(parsed({"name": "m", "aliases": ["m", "n", "n"]})) == ["m"]


def test_ten_thousand_entries_are_read_in_seconds(tmp_path: Path) -> None:
    models = [
        {"name": f"m{i}", "backends": [{"url": f"http://m{i}:8000"}], "aliases": [f"a{i}"]} for i in range(10_000)
    ]
    path = tmp_path / "catalogue.json"
    path.write_text(json.dumps({"models": models}))

    began = time.perf_counter()
    catalogue = load_catalogue(path)

    assert len(catalogue) == 10_000
    assert time.perf_counter() - began < 20


@pytest.mark.parametrize(
    ("models", "reason"),
    [
        ([{"name": "m"}] * 1_000_000, "it lists 1000000 models; the limit is 20000"),
        ([{"name": "m", "backends": [{}] * 4096}] * 20, "it lists 81920 backends; the limit is 50000"),
    ],
    ids=["models", "backends"],
)
def test_a_document_of_any_size_is_refused_before_it_fills_the_memory(models: list[Any], reason: str) -> None:
    began = time.perf_counter()

    with pytest.raises(CatalogueError, match=reason):
        parsed(*models)
    assert time.perf_counter() - began < 5


def test_however_many_entries_are_refused_the_lines_about_them_are_few() -> None:
    catalogue = parsed({"name": "good"}, *({"name": f"m{number}", "x": 1} for number in range(5000)))

    assert list(catalogue) == ["good"]
    assert len(catalogue.problems) == 101
    assert catalogue.problems[-1] == "and 4900 more"


def test_a_million_backends_are_refused_in_seconds() -> None:
    began = time.perf_counter()

    assert "at most 4096" in problem(backends=[{"url": "http://x"}] * 1_000_000)
    assert time.perf_counter() - began < 10


@pytest.mark.parametrize(
    "entry",
    [
        {"backends": [{"url": "ftp://x"}] * 50_000},
        {"aliases": ["a b"] * 50_000},
        {f"key{number}": 1 for number in range(50_000)},
        {"k" * 1_000_000: 1},
        {"evil\nkey": 1},
        {"name": "m" * 1_000_000},
        {"owner": "o" * 1_000_000},
    ],
    ids=["backends", "aliases", "keys", "a long key", "a key with a line break", "name", "owner"],
)
def test_however_wrong_an_entry_is_the_log_line_about_it_is_short(entry: dict[str, Any]) -> None:
    began = time.perf_counter()

    assert len(problem(**entry)) < 2000
    assert time.perf_counter() - began < 10


# Backend URLs


@pytest.mark.parametrize(
    "url",
    [
        "http://llama-3-8b:8000",
        "https://tgi.models.svc.cluster.local",
        "http://127.0.0.1:6443",
        "http://10.0.0.1:8000/base/path",
        "http://[::1]:8000",
        "http://[fd12:3456::1]",
        "http://[FD12:3456::1]:80",
        "http://Llama.example",
        "http://under_score:65535",
    ],
)
def test_an_ordinary_backend_url_is_kept_but_for_slashes_and_v1_at_its_end(url: str) -> None:
    assert check_backend_url(url) == url
    for end in ("/", "//", "/v1", "/v1/", "//v1", "/v1/v1"):
        assert check_backend_url(url + end) == url


@pytest.mark.parametrize(
    "url", ["http://v1", "http://api.v1:80", "http://a/v1beta", "http://a/v1/b", "http://a/xv1", "http://a/V1"]
)
def test_only_a_v1_of_the_path_and_at_its_end_is_taken_off(url: str) -> None:
    assert check_backend_url(url) == url


def test_a_backend_with_and_without_v1_is_the_same_backend() -> None:
    entry = {"name": "m", "backends": [{"url": "http://a/x/v1"}]}
    [known] = parse_catalogue({"models": [entry]}).values()

    assert [backend.url for backend in known.backends] == ["http://a/x"]
    # What a registry stored and gives away is read once more.
    [again] = parse_catalogue({"models": [known.model_dump(mode="json")]}).values()
    assert again == known
    assert "the same backend url is listed twice" in problem(backends=[{"url": "http://a"}, {"url": "http://a/v1"}])


LINK_LOCAL = [
    "http://169.254.169.254/",
    "http://169.254.169.254.",
    "http://169.254.0.1:80",
    "http://[fe80::1]",
    "http://[fe80::1%25eth0]",
    "http://[::ffff:169.254.169.254]",
    "http://[::ffff:a9fe:a9fe]:80",
    "http://[::169.254.169.254]",
    "http://[64:ff9b::169.254.169.254]",
    "http://[2002:a9fe:a9fe::]",
]
METADATA = [
    "http://metadata",
    "http://metadata.google.internal",
    "http://METADATA.Google.Internal.",
    "http://metadata.goog",
    "http://instance-data",
    "http://instance-data.ec2.internal",
    "http://100.100.100.200",
    "http://[fd00:ec2::254]",
    "http://[FD00:EC2:0:0::254]",
]
OTHER_SPELLINGS = [
    "http://2852039166",
    "http://0xa9fea9fe",
    "http://0xA9.0xFE.0xA9.0xFE",
    "http://0251.0376.0251.0376",
    "http://169.254.43518",
    "http://169.16689662",
    "http://0xA9.254.169.254.",
    "http://127.1",
    "http://0",
]
UNUSABLE = [
    "http://255.255.255.255",
    "http://0.0.0.0",
    "http://[::]",
    "http://[::ffff:0.0.0.0]",
    "http://224.0.0.1",
    "http://[ff02::1]",
]


@pytest.mark.parametrize("url", [*LINK_LOCAL, *METADATA, *OTHER_SPELLINGS, *UNUSABLE])
def test_an_address_that_is_nobodys_backend_is_refused(url: str) -> None:
    with pytest.raises(ValueError, match=r"unusable address|no usable host|not a URL"):
        check_backend_url(url)


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("http://user:pw@x", "user information"),
        ("http://@x", "user information"),
        ("http://allowed\\@evil/", "user information|backslash"),
        ("file:///etc/passwd", "must start with http"),
        ("javascript:alert(1)", "must start with http"),
        ("ftp://x", "must start with http"),
        ("//x", "must start with http"),
        ("", "must start with http"),
        ("http://", "no usable host"),
        ("http:///path", "no usable host"),
        ("http://:80", "no usable host"),
        ("http://x:0", "port 0"),
        ("http://x:65536", "[Pp]ort"),
        ("http://x:-1", "[Pp]ort"),
        ("http://x:abc", "[Pp]ort"),
        ("http://x::8", "[Pp]ort"),
        ("http://[::1", "not a URL"),
        ("http://x\n", "control characters"),
        ("http://x\r\nhost: y", "control characters"),
        ("http://x\t", "control characters"),
        ("http://x y", "spaces"),
        ("http://x\x7f", "control characters"),
        ("http://\u212a", "control characters"),
        ("http://x/?a=b", "query"),
        ("http://x/?", "query"),
        ("http://x/#f", "fragment"),
        ("http://x/#", "fragment"),
        ("http://x/a/../b", r"'\.\.'"),
        ("http://x/./b", r"'\.'"),
        ("http://x/.", r"'\.'"),
        ("http://x/%2e%2e/b", "'%'"),
    ],
)
def test_a_url_that_is_no_base_url_is_refused_with_the_reason(url: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        check_backend_url(url)


@pytest.mark.parametrize("url", ["http://[v1.x]", "http://[1::2]x", "http://xn--a", "http://a<b", "http://a%00b"])
def test_a_url_that_httpx_would_not_take_is_refused(url: str) -> None:
    with pytest.raises(ValueError, match="backend url"):
        check_backend_url(url)


def test_a_url_of_any_length_is_refused_in_a_short_sentence() -> None:
    assert "backends.0.url: must have at most 2048 characters" in problem(
        backends=[{"url": "http://" + "a" * 1_000_000}]
    )
    assert len(problem(backends=[{"url": "ftp://" + "a" * 2000}])) < 400


@pytest.mark.parametrize(
    "url",
    [
        "http://user:s3cret@x",
        "ftp://user:s3cret@x",
        "http://user:s3cret@x y",
        "http://user:s3cret\\@x",
        "http://user:s3cret@x:99999",
        "http://user:s3cret@x:0",
        "http://user:s3cret@[::1",
        "http://user:s3/cret@x",
        "http://user:s3cret@169.254.169.254",
        "http://user:s3cret@x/?a=b",
        "http://x/?token=s3cret",
    ],
)
def test_a_secret_in_a_refused_url_is_not_repeated(url: str) -> None:
    sentence = problem(backends=[{"url": url}])

    assert "s3" not in sentence
    assert "cret" not in sentence


hosts = st.one_of(
    st.from_regex(r"[a-z0-9.-]{1,20}", fullmatch=True),
    st.ip_addresses(v=4).map(str),
    st.ip_addresses(v=6).map(lambda address: f"[{address}]"),
    st.integers(0, 2**32).map(str),
    st.text(st.characters(codec="ascii"), max_size=12),
)
urls = st.one_of(
    st.builds(
        "{}://{}{}{}".format,
        st.sampled_from(["http", "https", "HTTP", "file", "ws"]),
        hosts,
        st.sampled_from(["", ":80", ":", ":65535", ":65536", ":x"]),
        st.one_of(st.just(""), st.text(st.characters(codec="ascii"), max_size=8).map("/{}".format)),
    ),
    st.text(max_size=30),
)


@settings(deadline=None, max_examples=50)
@given(urls)
@example("http://a<b")
@example("http://[v1.x]")
@example("http://x/?")
@example("http://x/./y")
def test_an_accepted_url_means_the_same_to_everybody_who_reads_it(url: str) -> None:
    try:
        accepted = check_backend_url(url)
    except ValueError:
        return
    parts, seen = urlsplit(accepted), httpx.URL(accepted + "/v1/models")

    assert parts.scheme == seen.scheme in ("http", "https")
    assert parts.hostname == seen.host
    assert parts.port == seen.port or (parts.port, seen.port) in {(80, None), (443, None)}
    assert seen.userinfo == b""
    assert seen.path == parts.path + "/v1/models"
    assert seen.query == b""
    assert not seen.fragment


@pytest.mark.parametrize("value", ["client", "ignore", "caller", 0, -5, 2**63 - 1, -(2**63)])
def test_a_priority_is_a_word_or_a_number(value: Any) -> None:
    assert parse_catalogue({"models": [{"name": "m", "priority": value}]})["m"].priority == value


@pytest.mark.parametrize("value", ["high", "5", 1.5, True, None, 2**63, -(2**63) - 1])
def test_no_other_priority_is_taken(value: Any) -> None:
    (problem,) = parse_catalogue({"models": [{"name": "bad", "priority": value}]}).problems

    assert problem.startswith("model 'bad': priority")


def test_a_key_is_known_by_its_name_before() -> None:
    entry = {"name": "m", "backends": ["http://a:1"]}

    (renamed,) = parse_catalogue({"models": [{**entry, "policy": "round_robin"}]}).values()
    both = parse_catalogue({"models": [{**entry, "policy": "round_robin", "balancing": "two_choices"}]})

    assert renamed.balancing == "round_robin"
    assert renamed.model_dump(exclude_unset=True).keys() == {"name", "backends", "balancing"}
    assert not both
    assert "'policy'" in both.problems[0]

"""The console's side of engines: their state, start, stop, scale, logs, and what the Overview says of them."""

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from control_plane.kept import Told
from control_plane.pure.engines import shown_line, with_engine
from control_plane.pure.fleet import ModelStanding, ModelStatus
from control_plane.pure.lifecycle import DriverError, Event, Exit, Instance, Observed, Standing, State
from control_plane.pure.model_tests import Step
from control_plane.services import model_results
from tests.control_plane.acts import act_of
from tests.control_plane.conftest import NOON, Running
from tests.control_plane.drivers import Scripted
from tests.control_plane.forms import hidden, sent
from tests.control_plane.pages import figures_of, links_of, page, part, rows_of, states_of, text_of
from tests.control_plane.people import begin_session, make_organisation, make_user
from tests.control_plane.test_console_overview import in_step
from tests.control_plane.test_fleet import backend
from tests.control_plane.test_overview import catalogue, of

pytestmark = pytest.mark.anyio
M = "/console/models/m"
ENGINE, LOGS, TESTS = f"{M}?tab=engine", f"{M}?tab=logs", f"{M}?tab=tests"
KILLED = Instance(
    "m-1",
    "failing",
    "CrashLoopBackOff: OOMKilled, exit code 137",
    NOON - 180_000,
    7,
    Exit(137, "OOMKilled", NOON - 200_000),
    ("main", "side"),
    tail=("CUDA out of \x1b[31mmemory",),
)
WAITING = Instance("m-2", "waiting", "FailedScheduling: 0/4 nodes are available", NOON - 180_000, containers=("main",))


@pytest.fixture
def driver() -> Scripted:
    return Scripted("kubernetes")


@pytest.fixture
async def plane(start_sqlite: Callable[..., Any], driver: Scripted) -> Running:
    """With the models `m`, whose engine is `engine`, and `n`, which has none."""
    found: Running = await start_sqlite(outside=driver.connections())
    await catalogue(found, m=of("10.0.0.1"), n=of("10.0.0.2"))
    body = {"driver": "kubernetes", "object": "engine", "max": 3}
    made = await found.admin.put("/api/v1/deployments/m", json=body, headers={"if-none-match": "*"})
    assert made.status_code == 201, made.text
    await make_user(found, "olga", "operator", password=None)
    await begin_session(found, "olga")
    return found


async def actions(plane: Running) -> list[tuple[str, str | None]]:
    rows = (await plane.admin.get("/api/v1/audit")).json()["data"]
    return [(row["action"], row["reason"]) for row in rows if row["action"].startswith("deployment.")]


async def test_without_a_driver_the_settings_are_named_and_nothing_is_asked(sqlite_plane: Running) -> None:
    await catalogue(sqlite_plane, m=of("10.0.0.1"))
    await make_user(sqlite_plane, "olga", "operator", password=None)
    await begin_session(sqlite_plane, "olga")

    for tab in (ENGINE, LOGS):
        html = await page(sqlite_plane, tab)
        assert "CONTROL_PLANE_KUBERNETES_NAMESPACE=" in html
        assert "CONTROL_PLANE_PROCESSES=" in html
    assert "Engine" not in figures_of(await page(sqlite_plane, M))
    assert sqlite_plane.plane.engines.idle


async def test_the_state_has_its_reason_instances_and_events(plane: Running, driver: Scripted) -> None:
    event = Event(NOON - 20_000, True, "BackOff", "back-off <b>restarting</b>", "Pod/m-1", 14)
    driver.observed = Observed(2, (KILLED, WAITING), (event,))

    html = await page(plane, ENGINE)

    assert "Failing. m-1: CrashLoopBackOff: OOMKilled, exit code 137 (3 min)" in text_of(html)
    assert rows_of(html)[0][:2] == ["m-1", "failing"]
    killed, waiting = rows_of(html)
    assert killed[4:6] == ["7", "OOMKilled, exit code 137 3 min ago"]
    assert "CUDA out of memory" in killed[3]
    assert waiting[1:4] == ["waiting", "3 min ago", "FailedScheduling: 0/4 nodes are available"]
    (told,) = rows_of(part(html, "live").partition(">Events ")[2])
    assert told == ["20 s ago", "BackOff", "back-off <b>restarting</b>", "Pod/m-1", "14"]
    assert {f"{LOGS}&pod=m-1", f"{LOGS}&pod=m-1&previous=1"} <= set(links_of(html))
    assert figures_of(html)["Engine"] == "failing for 3 min"


async def test_an_engine_is_started_scaled_and_stopped_with_reasons(plane: Running, driver: Scripted) -> None:
    assert f"{ENGINE}&act=start" in links_of(await page(plane, ENGINE))
    started = await sent(plane, f"{ENGINE}&act=start", do="start")
    more = await sent(plane, f"{ENGINE}&act=scale", do="scale", replicas="3")
    fewer = await sent(plane, f"{ENGINE}&act=scale", do="scale", replicas="2")
    least = await sent(plane, f"{ENGINE}&act=scale", do="scale", replicas="2", reason="night")
    silent = await sent(plane, f"{ENGINE}&act=stop", do="stop", reason=" ")
    stopped = await sent(plane, f"{ENGINE}&act=stop", do="stop", reason="weekend")
    many = await sent(plane, f"{ENGINE}&act=scale", do="scale", replicas="9", reason="x")

    assert [one.status_code for one in (started, more, fewer, least, silent, stopped, many)] == [
        303, 303, 422, 303, 422, 303, 422,
    ]  # fmt: skip
    assert driver.scaled == [1, 3, 2, 0]
    assert started.headers["location"] == f"{ENGINE}&done=started"
    # The dialog is there again, with what was typed and what is wrong.
    assert "<dialog" in fewer.text
    assert 'id="reason-wrong"' in fewer.text + silent.text
    assert await actions(plane) == [
        ("deployment.stop", "weekend"),
        ("deployment.scale", "night"),
        ("deployment.scale", None),
        ("deployment.start", None),
        ("deployment.create", None),
    ]


async def test_a_dialog_names_the_object_and_what_becomes_of_requests(plane: Running, driver: Scripted) -> None:
    await driver.scale("engine", 2)
    await in_step(plane, backend("10.0.0.1:8000"))

    html = await page(plane, f"{ENGINE}&act=stop")
    dialog = text_of(html.partition("<dialog")[2])

    assert "Stop m" in dialog
    assert "engine gets no instance any more: now it has 2." in dialog
    assert "terminationGracePeriodSeconds; then they are broken off" in dialog
    assert "Requests are refused until somebody starts it." in dialog
    assert 'name="reason"' in html


async def test_who_else_sets_the_number_is_named_instead_of_buttons(plane: Running, driver: Scripted) -> None:
    driver.observed = Observed(1, (WAITING,), owner="ScaledObject m")

    html = await page(plane, f"{ENGINE}&act=stop")

    assert "ScaledObject m sets the number of instances" in text_of(html)
    assert "<dialog" not in html
    assert not [link for link in links_of(html) if "act=s" in link]
    assert (await sent(plane, ENGINE, do="stop", reason="x")).status_code == 409


async def test_what_is_not_switched_on_names_its_setting(plane: Running, driver: Scripted) -> None:
    driver.scales = driver.reads_logs = False

    engine, logs = await page(plane, ENGINE), await page(plane, LOGS)

    assert "CONTROL_PLANE_KUBERNETES_SCALE=on" in engine
    assert not [link for link in links_of(engine) if "act=s" in link]
    assert "CONTROL_PLANE_KUBERNETES_LOGS=on" in logs


async def test_a_deployment_is_set_changed_and_forgotten_by_its_version(plane: Running, driver: Scripted) -> None:
    other = "/console/models/n?tab=engine"
    fields = {"do": "deploy", "driver": "kubernetes", "object": "engine", "min": "1", "max": "2", "etag": ""}
    dialog = await page(plane, f"{other}&act=deploy")
    made = await sent(plane, f"{other}&act=deploy", **fields)
    again = await sent(plane, f"{other}&act=deploy", **fields)
    etag = hidden(await page(plane, f"{other}&act=deploy"), "etag")
    changed = await sent(
        plane, f"{other}&act=deploy", **{**fields, "etag": etag, "scale_to_zero": "1", "idle_seconds": "60"}
    )
    without = text_of(await page(plane, f"{other}&act=stop"))
    await plane.admin.put("/models/n", json={"name": "n", "backends": ["http://10.0.0.2:8000"], "hold": 60})
    old = await sent(plane, f"{other}&act=forget", do="forget", etag=etag)
    wrong = await sent(plane, f"{other}&act=deploy", **{**fields, "etag": etag, "max": "99", "object": "-"})
    now = await page(plane, f"{other}&act=forget")
    gone = await sent(plane, f"{other}&act=forget", do="forget", etag=hidden(now, "etag"))

    assert '<option value="engine">' in dialog
    assert [one.status_code for one in (made, again, changed, old, wrong, gone)] == [303, 412, 303, 412, 422, 303]
    assert "From zero No: its entry has no hold" in without
    assert "Requests are refused until somebody starts it" in without
    assert "A request starts it; 1 min without a request stop it." in text_of(now)
    assert 'id="object-wrong"' in wrong.text
    assert "Nothing says which object runs it." in await page(plane, other)
    assert driver.scaled == []


async def test_a_driver_without_names_still_has_a_form(plane: Running, driver: Scripted) -> None:
    driver.problem = DriverError("away", "The API server does not answer.")

    html = await page(plane, f"{ENGINE}&act=deploy")

    assert "The API server does not answer." in html
    assert 'name="object"' in html
    assert "Unknown. The API server does not answer." in text_of(html)


async def overview(plane: Running) -> str:
    """Once the drivers were looked at."""
    await plane.plane.engines.get(-1, 30)
    return await page(plane, "/console/")


async def test_the_overview_has_engines_that_fail_with_their_reason(plane: Running, driver: Scripted) -> None:
    await in_step(plane, backend("10.0.0.1:8000", "open"), backend("10.0.0.2:8000", model="n"))
    driver.observed = Observed(1, (KILLED,))

    html = await overview(plane)
    models = await page(plane, "/console/models")

    (row,) = rows_of(part(html, "bad"))
    assert row[:2] == ["m", "failing"]
    assert "Its engine fails: m-1: CrashLoopBackOff: OOMKilled, exit code 137. Its only backend takes no" in row[4]
    assert ENGINE in links_of(part(html, "bad"))
    assert rows_of(models)[0][:2] == ["m", "failing failing"]


async def test_a_failed_last_test_is_on_the_overview_the_list_and_the_page(plane: Running) -> None:
    await in_step(plane, backend("10.0.0.1:8000"), backend("10.0.0.2:8000", model="n"))
    steps = Step("listed", "ok", "It names 'n'.", 1.0), Step("call", "failed", "chat: 500: <b>oops</b>", 2.0)
    act = act_of(plane, "olga", "operator")
    await model_results.add(plane.plane, act, "n", None, "chat", NOON - 60_000, steps)

    home, models = await page(plane, "/console/"), await page(plane, "/console/models")
    own, results = await page(plane, "/console/models/n"), await page(plane, "/console/models/n?tab=tests")

    (row,) = rows_of(part(home, "bad"))
    assert row[:2] == ["n", "ok"]
    for html in (row[4], text_of(own)):
        assert "Last test failed 1 min ago : call: chat: 500: <b>oops</b>" in html
    assert "/console/models/n?tab=tests" in links_of(home)
    assert "test failed" in text_of(models)
    assert states_of(results)[-3:] == [("bad", "failed"), ("ok", "ok"), ("bad", "failed")]


async def test_a_driver_that_does_not_answer_holds_up_no_page(
    plane: Running, driver: Scripted, monkeypatch: pytest.MonkeyPatch
) -> None:
    hung = asyncio.Event()
    looks: list[str] = []

    async def look(object: str) -> Observed:
        looks.append(object)
        await hung.wait()
        return Observed(0)

    monkeypatch.setattr(driver, "look", look)
    loop = asyncio.get_running_loop()
    began = loop.time()
    pages = [await page(plane, "/console/") for _ in range(3)]
    took = loop.time() - began
    hung.set()

    assert all("What runs engines does not answer" in html for html in pages)
    # Half a second each; a page by itself takes some.
    assert took < 10
    assert looks == ["engine"]


@pytest.mark.parametrize("role", ["viewer", None])
async def test_others_see_no_reason_and_no_button(plane: Running, driver: Scripted, role: str | None) -> None:
    await in_step(plane, backend("10.0.0.1:8000", "open"))
    driver.observed = Observed(1, (KILLED,))
    await make_user(plane, "vic", role, password=None)
    if role is None:
        await make_organisation(plane, "team-a", vic="owner")
    await overview(plane)
    await begin_session(plane, "vic")

    home = await page(plane, "/console/")
    engine = await plane.client.get(ENGINE)
    logs = await plane.client.get(LOGS)

    assert logs.status_code == 403
    assert engine.status_code == (200 if role else 403)
    assert ("OOMKilled" in home) is (role is not None)
    assert "act=" not in engine.text
    assert "tab=logs" not in engine.text
    assert (await sent(plane, ENGINE, do="stop", reason="x")).status_code == 403


async def test_who_deletes_a_model_is_told_that_its_engine_runs_on(plane: Running, driver: Scripted) -> None:
    stop = f"{M}?tab=engine&act=stop"
    seen = []
    for observed in (Observed(0), Observed(1, (KILLED,))):
        driver.observed = observed
        seen.append(stop in links_of(await page(plane, f"{M}?tab=engine&act=delete")))

    assert seen == [False, True]


async def test_a_log_is_text_with_nothing_unseen_in_it(plane: Running, driver: Scripted) -> None:
    driver.observed = Observed(2, (WAITING, KILLED))
    driver.add(*(f"line {number}" for number in range(120)), "\x1b[1;31mERROR\x1b[0m <script>x</script> \u202egnp\x07")

    html = await page(plane, f"{LOGS}&lines=100")
    chosen = await page(plane, f"{LOGS}&pod=m-2&container=side&lines=100")
    side = await plane.client.get(f"{LOGS}&pod=m-1&container=side&previous=1&download=1")

    log = part(html, "log")
    # The one that fails is shown first, in its first container.
    assert "main: ERROR &lt;script&gt;x&lt;/script&gt; \\u202egnp\\x07" in log
    assert "line 20\n" not in log
    assert "only the last 100 lines" in log
    assert 'data-url="/api/v1/logs?model=m&amp;pod=m-1&amp;container=main&amp;tail=100&amp;follow=true"' in html
    assert "main: line 119" in chosen
    assert "/console/triage?model=m&pod=m-1" in links_of(html)
    assert side.headers["content-disposition"] == 'attachment; filename="m-1.previous.log"'
    assert side.headers["content-type"] == "text/plain; charset=utf-8"
    assert side.text.splitlines()[-1] == "side: ERROR <script>x</script> \\u202egnp\\x07"


async def test_a_log_that_cannot_be_read_says_why(plane: Running, driver: Scripted) -> None:
    empty = await page(plane, LOGS)
    driver.observed = Observed(1, (KILLED,))
    gone = await page(plane, f"{LOGS}&pod=m-9")

    async def log(object: str, query: Any) -> Any:
        raise DriverError("not_found", "The container has no log before this one.")
        yield

    driver.log = log  # type: ignore[method-assign]
    previous = await page(plane, f"{LOGS}&previous=1")
    none = await page(plane, "/console/models/n?tab=logs")

    assert "Nothing runs, so there is no log." in empty
    assert "There is no pod or process m-9 any more." in gone
    assert "The container has no log before this one." in previous
    assert "Nothing says which object runs it." in none


def standing(state: ModelStatus) -> ModelStanding:
    return ModelStanding("m", state, 0, 1, NOON, "It is so.", (), 0, 0)


@pytest.mark.parametrize(
    ("state", "engine", "starts", "found", "sentence"),
    [
        ("failing", "failing", False, "failing", "Its engine fails: m-1: why. It is so."),
        ("unknown", "failing", False, "failing", "Its engine fails: m-1: why."),
        ("ok", "failing", False, "degraded", "Its engine fails: m-1: why. It is so."),
        ("failing", "stopped", True, "ok", "Its engine is stopped, and the next request starts it."),
        ("failing", "stopped", False, "failing", "Its engine is stopped. It is so."),
        ("failing", "loading", False, "failing", "Its engine is loading: m-1: why. It is so."),
        ("failing", "loading", True, "degraded", "Its engine is loading: m-1: why. Requests wait for it."),
        ("unknown", "loading", True, "unknown", "Its engine is loading: m-1: why."),
        ("failing", "ready", True, "degraded", "Its engine is ready; routers see it within seconds."),
        ("ok", "waiting", False, "ok", "It is so."),
        ("failing", "ready", False, "failing", "It is so."),
        ("failing", "unknown", False, "failing", "It is so."),
    ],
)
def test_a_model_is_as_routers_and_its_engine_are(
    state: ModelStatus, engine: State, starts: bool, found: str, sentence: str
) -> None:
    seen = Standing(engine, 0, 1, "m-1: why.", NOON - 1)
    one = with_engine(standing(state), seen, starts, NOON)

    assert (one.state, one.sentence) == (found, sentence)
    assert "why" not in with_engine(standing(state), seen, starts, NOON, whole=False).sentence
    # Routers have learned of it by then, and know why they do not use it.
    late = with_engine(standing(state), seen, starts, NOON + 30_000)
    assert late.state == ("failing" if (state, engine) == ("failing", "ready") else found)


@pytest.mark.parametrize(
    ("line", "shown"),
    [
        ("plain\ttext é 漢", "plain\ttext é 漢"),
        ("\x1b[1;31mred\x1b[0m \x1b]8;;http://x\x1b\\link\x1b]8;;\x07", "red link"),
        ("a\x00b\rc\x7f\x9b\x1b", "a\\x00b\\rc\\x7f\\x9b\\x1b"),
        ("\u202etxt.exe\u2066", "\\u202etxt.exe\\u2066"),
    ],
)
def test_a_line_is_shown_without_what_is_not_seen(line: str, shown: str) -> None:
    assert shown_line(line) == shown


async def test_what_is_told_is_made_once_for_all_and_kept() -> None:
    now, made = 0.0, 0
    going = asyncio.Event()

    async def make() -> int:
        nonlocal made
        made += 1
        await going.wait()
        if made == 3:
            raise ValueError("no")
        return made

    told = Told(lambda: now)
    keeping = asyncio.create_task(told.keep(make))
    assert await told.get(2, 0.01) is None
    going.set()
    assert await asyncio.gather(*(told.get(2, 5) for _ in range(3))) == [(0.0, 1)] * 3
    now = 3.0
    assert await told.get(2, 5) == (0.0, 2)
    now = 6.0
    assert await told.get(2, 5) == (3.0, 2)
    keeping.cancel()

    assert made == 3

"""The control plane that the chart runs: what it is told, who may reach it, and when its database is migrated."""

from pathlib import Path
from typing import Any

import pytest

from control_plane.settings import PREFIX, Settings, load_settings
from tests.k8s.chart_values import NAMESPACE
from tests.k8s.charts import (
    INSTALLS,
    MARKED,
    Installed,
    Json,
    component_of,
    environ,
    installed,
    matches,
    require_helm,
    router_pod,
)

require_helm()
pytestmark = pytest.mark.timeout(600)

# Whoever made the Secrets, they have what the settings want.
GIVEN = {
    "DATABASE_URL": "postgresql://control:secret@db/control",
    "SERVICE_TOKEN": "t" * 32,
    "KEY_PEPPER": "p" * 32,
    "OIDC_CLIENT_SECRET": "o" * 32,
    "HUB_TOKEN": "hf_token",
    "PROMETHEUS_TOKEN": "prometheus",
}
CONTROLS = [name for name in INSTALLS if name.startswith(("control ", "control-sqlite ", "control-engines "))]
# Of machines without a cluster
ELSEWHERE = {"kubernetes_url", "processes"}
every_control = pytest.mark.parametrize(
    "name",
    [
        *CONTROLS,
        "marks of a control plane",
        "marks of a control plane with SQLite",
        "a control plane that keeps nothing",
    ],
)


def deployment(found: Installed) -> Json:
    spec: Json = found.one("Deployment", "control")["spec"]
    return spec


def pod(found: Installed) -> Json:
    spec: Json = deployment(found)["template"]["spec"]
    return spec


def container(found: Installed) -> Json:
    (one,) = pod(found)["containers"]
    read: Json = one
    return read


def variables(of: Json) -> dict[str, str]:
    """The settings of a container, as its process would find them."""
    listed = [variable for variable in of["env"] if variable["name"].startswith(PREFIX)]
    return {v["name"]: v.get("value") or GIVEN[v["name"].removeprefix(PREFIX)] for v in listed}


def settings(found: Installed) -> Settings:
    return load_settings(variables(container(found)))


def secrets(of: Json) -> dict[str, tuple[str, str]]:
    """Where variables come from that are secrets."""
    sources = {v["name"].removeprefix(PREFIX): v.get("valueFrom", {}).get("secretKeyRef") for v in of["env"]}
    return {name: (source["name"], source["key"]) for name, source in sources.items() if source}


def jobs(objects: list[Json]) -> list[Json]:
    return [o for o in objects if o["kind"] == "Job"]


# What it is told


@every_control
def test_it_accepts_its_settings(name: str) -> None:
    found = installed(name)
    read, one = settings(found), container(found)

    assert (one["command"], one["args"]) == (["control-plane"], ["serve"])
    ports = {port["name"]: port["containerPort"] for port in one["ports"]}
    # People and CI never by the port of the routers.
    assert ports == {"http": read.port, "api": read.api_port}
    assert read.log_format == "json"
    assert read.router_url is not None
    assert read.router_url.startswith(f"http://{found.one('Deployment', 'router')['metadata']['name']}:")


def test_every_setting_of_it_can_be_set() -> None:
    """A new one gets a value of its own; what is told beside is in `control.extraEnv`."""
    told = {name.removeprefix(PREFIX).lower() for name in variables(container(installed("marks of a control plane")))}

    assert set(Settings.model_fields) - told == ELSEWHERE


def test_each_value_arrives() -> None:
    read = settings(installed("control on 1.37"))

    assert read.url.get_backend_name() == "postgresql"
    assert not read.upgrades
    assert (read.currency, read.record_days, read.hourly_days) == ("EUR", 30, 400)
    assert read.origin == "https://inference-admin.example.com"
    assert [str(network) for network in read.trusted_proxies] == ["10.0.0.0/8"]
    assert (read.oidc_issuer, read.oidc_client_id) == ("https://id.example.com:8443/realms/all", "inference")
    assert read.oidc_roles == {
        "platform": "admin",
        "on-call": "operator",
        "ml-platform": "operator",
        "All people": "viewer",
    }
    assert read.password_login == "on"


def test_each_value_arrives_where_it_is_meant_to() -> None:
    read, control = settings(installed("marks of a control plane with SQLite")), MARKED["control"]

    assert (read.port, read.api_port) == (control["ports"]["http"], control["ports"]["api"])
    assert (read.log_level, read.host) == (control["logLevel"], MARKED["router"]["host"])
    assert (read.usage_days, read.hourly_days) == (control["usage"]["days"], control["usage"]["hourlyDays"])
    assert read.admin_email == control["bootstrap"]["email"]
    assert read.oidc_groups_claim == control["oidc"]["groupsClaim"]
    assert [str(network) for network in read.trusted_proxies] == control["trustedProxies"]
    assert read.public_url == control["console"]["publicUrl"]
    assert read.router_public_url == control["console"]["routerUrl"]
    assert (read.log_url, read.trace_url) == (control["console"]["logUrl"], control["console"]["traceUrl"])
    kubernetes = control["engines"]["kubernetes"]
    assert read.kubernetes_namespace == kubernetes["namespace"]
    assert (read.kubernetes_scale, read.kubernetes_logs, read.triage_engine_logs) == ("on", "on", "on")
    assert read.model_test_every == control["modelTestEverySeconds"]
    assert (read.hub_endpoint, read.prometheus_url) == (control["hub"]["endpoint"], control["prometheus"]["url"])
    assert [str(root) for root in read.model_roots] == control["modelRoots"]
    assert read.triage_model == control["triage"]["model"]


def test_what_concerns_engines_is_off_unless_it_is_switched_on() -> None:
    read = settings(installed("control on 1.37"))

    assert read.kubernetes_namespace is None
    assert (read.model_test_every, read.hub_endpoint, read.prometheus_url) == (None, None, None)
    assert (read.model_roots, read.triage_model) == ((), None)


def test_router_and_control_plane_agree_on_what_both_must_have() -> None:
    """The currency, the pepper, and the token of the routers."""
    found = installed("control on 1.37")
    of_control, of_router = secrets(container(found)), secrets_of_router(found)

    assert of_control["SERVICE_TOKEN"] == of_router["REGISTRY_TOKEN"] == ("service-token", "token")
    assert of_control["KEY_PEPPER"] == of_router["KEY_PEPPER"] == ("pepper", "pepper")
    assert settings(found).currency == environ(found)["INFERENCE_API_CURRENCY"]


def secrets_of_router(found: Installed) -> dict[str, tuple[str, str]]:
    sources = {v["name"]: v.get("valueFrom", {}).get("secretKeyRef") for v in router_pod(found)["containers"][0]["env"]}
    return {name.removeprefix("INFERENCE_API_"): (s["name"], s["key"]) for name, s in sources.items() if s}


def test_routers_have_all_from_it_unless_they_are_told_otherwise() -> None:
    told = environ(installed("control on 1.37"))

    assert told["INFERENCE_API_REGISTRY_URL"] == "http://inference-api-control:8081"
    assert (told["INFERENCE_API_POLICY"], told["INFERENCE_API_USAGE"]) == ("registry", "registry")
    assert told["INFERENCE_API_REPORT_INTERVAL"] == "5"
    assert router_pod(installed("control on 1.37"))["containers"][0]["startupProbe"]["httpGet"]["path"] == "/healthz"
    other = environ(installed("a control plane for the policy of others"))
    assert other["INFERENCE_API_POLICY"] == "/etc/inference-api-policy/policy.yaml"
    assert other["INFERENCE_API_USAGE"] == "log"
    assert other["INFERENCE_API_REPORT_INTERVAL"] == "2.5"
    # One of others, too, but no registry that has models only.
    assert environ(installed("a control plane"))["INFERENCE_API_REPORT_INTERVAL"] == "5"
    assert "INFERENCE_API_REPORT_INTERVAL" not in environ(installed("full on 1.37"))
    assert secrets_of_router(installed("a control plane for the policy of others"))["REGISTRY_TOKEN"] == (
        "narrow-token",
        "token",
    )


@pytest.mark.parametrize("name", [*CONTROLS, "a control plane by Argo CD", "a control plane, upgraded"])
def test_no_secret_is_made_or_in_the_clear(name: str) -> None:
    """One that is drawn at random would be another one at each render."""
    found = installed(name)
    values = {v["name"].removeprefix(PREFIX) for v in container(found)["env"] if "value" in v}

    assert not found.of("Secret")
    assert not GIVEN.keys() - {"DATABASE_URL"} & values
    assert ("DATABASE_URL" in values) == settings(found).upgrades


def test_the_first_admin_has_the_password_of_a_secret() -> None:
    found = installed("control-sqlite on 1.37")
    read = settings(found)
    volumes = {volume["name"]: volume for volume in pod(found)["volumes"]}
    mounts = {mount["mountPath"]: mount for mount in container(found)["volumeMounts"]}

    assert read.admin_password_file is not None
    mount = mounts[str(read.admin_password_file.parent)]
    (source,) = volumes[mount["name"]]["projected"]["sources"]
    assert source["secret"] == {"name": "first-admin", "items": [{"key": "password", "path": "password"}]}
    assert mount["readOnly"]
    assert read.admin_email == "ana@example.com"
    assert "ADMIN_EMAIL" not in {v["name"].removeprefix(PREFIX) for v in container(installed("control on 1.37"))["env"]}


def test_postgresql_is_verified_by_the_ca_that_is_given() -> None:
    """By the variables of libpq, which asyncpg reads: in the URL they would be part of a Secret."""
    for of in (container(installed("control on 1.37")), *pod(installed("control on 1.37"))["initContainers"]):
        given = {v["name"]: v.get("value") for v in of["env"]}
        mounts = {mount["mountPath"] for mount in of["volumeMounts"]}
        assert given["PGSSLMODE"] == "verify-full"
        assert str(Path(given["PGSSLROOTCERT"] or "").parent) in mounts
    assert not any(v["name"].startswith("PGSSL") for v in container(installed("a control plane, the same"))["env"])


# How many there are


def test_a_file_has_one_owner_and_a_volume() -> None:
    found = installed("control-sqlite on 1.37")
    spec = deployment(found)
    (data,) = [volume for volume in pod(found)["volumes"] if volume["name"] == "data"]
    claim = found.one("PersistentVolumeClaim", "control")

    assert (spec["replicas"], spec["strategy"]) == (1, {"type": "Recreate"})
    assert data["persistentVolumeClaim"] == {"claimName": claim["metadata"]["name"]}
    assert claim["metadata"]["annotations"]["helm.sh/resource-policy"] == "keep"
    assert settings(found).upgrades
    path = Path(settings(found).url.database or "")
    assert str(path.parent) in {mount["mountPath"] for mount in container(found)["volumeMounts"]}
    assert not found.of("Job")
    assert not found.of("PodDisruptionBudget", "control")
    assert "lost with the pod" in installed("a control plane that keeps nothing").notes


def test_several_are_replaced_one_by_one() -> None:
    found = installed("control on 1.37")
    spec = deployment(found)
    (budget,) = found.of("PodDisruptionBudget", "control")

    assert (spec["replicas"], spec["strategy"]["rollingUpdate"]) == (2, {"maxUnavailable": 0, "maxSurge": 1})
    assert budget["spec"]["maxUnavailable"] == 1
    assert matches(budget["spec"]["selector"]["matchLabels"], spec["template"]["metadata"]["labels"])
    assert not [v for v in pod(found)["volumes"] if "persistentVolumeClaim" in v]
    assert not found.of("PersistentVolumeClaim")


@every_control
def test_probes_never_depend_on_the_database_of_the_moment(name: str) -> None:
    probes = {key: container(installed(name))[f"{key}Probe"]["httpGet"] for key in ("startup", "readiness", "liveness")}

    assert {key: probe["path"] for key, probe in probes.items()} == {
        "startup": "/healthz",
        "readiness": "/readyz",
        "liveness": "/healthz",
    }
    assert {probe["port"] for probe in probes.values()} == {"http"}


# When the database is migrated


def test_a_first_install_migrates_by_a_job_like_any_other_object() -> None:
    """A hook would come before whatever makes the Secret of the database."""
    (job,) = jobs(installed("control on 1.37").objects)

    assert not [key for key in job["metadata"]["annotations"] if "hook" in key]
    assert not jobs(installed("control on 1.37").hooks)
    (one,) = job["spec"]["template"]["spec"]["containers"]
    assert (one["command"], one["args"]) == (["control-plane"], ["migrate"])
    assert secrets(one) == {"DATABASE_URL": ("control-plane-database", "url")}
    assert load_settings(variables(one)).url.database == "control"


def test_an_upgrade_migrates_before_it_changes_anything() -> None:
    found = installed("a control plane, upgraded")
    (job,) = jobs(found.upgrade_hooks)

    assert job["metadata"]["annotations"]["helm.sh/hook"] == "pre-upgrade"
    assert job["metadata"]["annotations"]["helm.sh/hook-delete-policy"] == "before-hook-creation,hook-succeeded"
    (one,) = job["spec"]["template"]["spec"]["containers"]
    assert one["image"].endswith(":0.2.0")
    # Done, and gone.
    assert not jobs(found.upgraded)
    policies = [hook for hook in found.upgrade_hooks if hook["kind"] == "NetworkPolicy"]
    (policy,) = [hook for hook in policies if component_of(hook) == "migration"]
    assert int(policy["metadata"]["annotations"]["helm.sh/hook-weight"]) < 0
    assert policy["spec"]["egress"]


def test_a_hook_needs_nothing_that_comes_after_it() -> None:
    """Where the stub was until now, there is no object of the control plane yet."""
    found = installed("a control plane from now on, ssa=True")
    for hook in jobs(installed("a control plane from the stub").upgrade_hooks):
        spec = hook["spec"]["template"]["spec"]
        assert "serviceAccountName" not in spec
        assert not [volume for volume in spec["volumes"] if "configMap" in volume or "persistentVolumeClaim" in volume]
    assert not jobs(found.upgrade_hooks)


def test_argo_cd_migrates_at_each_sync() -> None:
    (job,) = jobs(installed("a control plane by Argo CD").objects)
    told = {key: value for key, value in job["metadata"]["annotations"].items() if key.startswith("argocd")}

    assert told == {
        "argocd.argoproj.io/hook": "PreSync",
        "argocd.argoproj.io/hook-delete-policy": "BeforeHookCreation,HookSucceeded",
    }
    (policy,) = installed("a control plane by Argo CD").of("NetworkPolicy", "migration")
    assert policy["metadata"]["annotations"]["argocd.argoproj.io/hook"] == "PreSync"
    assert int(policy["metadata"]["annotations"]["argocd.argoproj.io/sync-wave"]) < 0


def test_a_job_that_runs_something_else_has_another_name() -> None:
    """A Job cannot be changed."""
    names = {
        name: jobs(installed(name).objects)[0]["metadata"]["name"]
        for name in ("a control plane, upgraded", "a control plane, the same", "a control plane, another image")
    }

    assert names["a control plane, upgraded"] == names["a control plane, the same"]
    assert names["a control plane, another image"] != names["a control plane, the same"]


def test_pods_wait_for_whoever_migrates() -> None:
    for name in ("control on 1.37", "a control plane without its Job"):
        (prepare,) = pod(installed(name))["initContainers"]
        assert "control-plane migrate --check" in prepare["args"][0], name
    assert not jobs(installed("a control plane without its Job").objects)


def test_two_renders_are_one() -> None:
    """Or GitOps would see a change in each sync."""
    first, second = (installed(name).objects for name in ("a control plane, the same", "a control plane, upgraded"))

    assert {(o["kind"], o["metadata"]["name"]): o for o in first} == {
        (o["kind"], o["metadata"]["name"]): o for o in second
    }


# Models


def test_routers_are_never_told_that_there_are_no_models_because_it_is_new() -> None:
    (prepare,) = pod(installed("control on 1.37"))["initContainers"]
    lines = prepare["args"][0].splitlines()

    assert lines[-1] == "grep -q name: /tmp/models.yaml || control-plane import /etc/inference-api/catalogue.yaml"
    assert {mount["mountPath"] for mount in prepare["volumeMounts"]} >= {"/tmp", "/etc/inference-api"}
    assert "import" not in pod(installed("a control plane, no models"))["initContainers"][0]["args"][0]


# Who may reach it, and whom it may


def rules(found: Installed, component: str, direction: str) -> list[Json]:
    (policy,) = found.of("NetworkPolicy", component)
    listed: list[Json] = policy["spec"][direction]
    return listed


def peers(found: Installed, port: str) -> list[Any]:
    """Components of the release that may connect to a port of it, and the rest as it is given."""
    listed = [rule for rule in rules(found, "control", "ingress") if rule["ports"][0]["port"] == port]
    assert len(listed) <= 1
    return [
        peer.get("podSelector", {}).get("matchLabels", {}).get("app.kubernetes.io/component", peer)
        for rule in listed
        for peer in rule["from"]
    ]


def namespace(name: str) -> Json:
    return {"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": name}}}


def test_routers_and_monitoring_reach_one_port_and_people_the_other() -> None:
    found = installed("control on 1.37")

    assert peers(found, "http") == ["router", "test", {"ipBlock": {"cidr": "192.0.2.0/24"}}, namespace("monitoring")]
    assert peers(found, "api") == [namespace("ingress")]
    # Nobody, unless somebody is named.
    assert peers(installed("control-sqlite on 1.37"), "api") == []


def test_it_may_connect_to_its_database_its_issuer_and_the_router() -> None:
    found = installed("control on 1.37")
    anywhere = {p["port"] for rule in rules(found, "control", "egress") if "to" not in rule for p in rule["ports"]}
    inside = [rule for rule in rules(found, "control", "egress") if "to" in rule]

    assert anywhere == {53, 5353, 6432, 8443}
    (rule,) = inside
    (peer,) = rule["to"]
    assert peer["podSelector"]["matchLabels"]["app.kubernetes.io/component"] == "router"
    # Hub, Prometheus and API server, where they are asked
    engines = rules(installed("control-engines on 1.37"), "control", "egress")
    assert {p["port"] for rule in engines if "to" not in rule for p in rule["ports"]} == {53, 5353, 443, 6443, 9090}
    # The Job needs the database only.
    assert {p["port"] for rule in rules(found, "migration", "egress") for p in rule["ports"]} == {53, 5353, 6432}


def test_the_router_lets_it_in_and_may_reach_it() -> None:
    found = installed("control on 1.37")
    (clients, _) = rules(found, "router", "ingress")
    labels = [peer.get("podSelector", {}).get("matchLabels", {}) for peer in clients["from"]]
    out = [to["podSelector"]["matchLabels"] for rule in rules(found, "router", "egress") for to in rule.get("to", ())]

    assert any(matches(one, deployment(found)["template"]["metadata"]["labels"]) for one in labels if one)
    assert [one["app.kubernetes.io/component"] for one in out] == ["control"]


def test_a_test_of_one_backend_reaches_it() -> None:
    found = installed("a control plane with engines, scale=True, logs=True")
    (engines, *_) = rules(found, "engine", "ingress")
    clients = [peer["podSelector"]["matchLabels"] for peer in engines["from"] if "podSelector" in peer]
    out = [to["podSelector"]["matchLabels"] for rule in rules(found, "control", "egress") for to in rule.get("to", ())]
    engine = found.of("Deployment", "engine")[0]["spec"]["template"]["metadata"]["labels"]

    assert any(matches(one, deployment(found)["template"]["metadata"]["labels"]) for one in clients)
    assert any(matches(one, engine) for one in out)


def test_without_a_console_no_service_has_its_port() -> None:
    found = installed("a control plane without a console")

    assert [port["name"] for port in found.one("Service", "control")["spec"]["ports"]] == ["http"]
    assert peers(found, "api") == []
    # Still not on the port of the routers.
    assert settings(found).api_port == 8082


def test_a_private_ca_of_a_control_plane_elsewhere_is_trusted() -> None:
    spec = router_pod(installed("a control plane, a private CA"))
    (one,) = spec["containers"]
    path = Path(next(v["value"] for v in one["env"] if v["name"] == "SSL_CERT_FILE"))
    (mount,) = [mount for mount in one["volumeMounts"] if mount["mountPath"] == str(path.parent)]
    (volume,) = [volume for volume in spec["volumes"] if volume["name"] == mount["name"]]

    (source,) = volume["projected"]["sources"]
    assert source["secret"] == {"name": "ca", "items": [{"key": "bundle", "path": path.name}]}


# What people are told


def test_the_notes_say_where_the_first_admin_comes_from() -> None:
    notes = installed("a control plane, the same").notes

    assert (
        f"kubectl --namespace {NAMESPACE} logs deploy/inference-api-control --all-pods=true | grep 'first admin'"
        in notes
    )
    assert "port-forward deploy/inference-api-control 8082:8082    # then http://127.0.0.1:8082/console/" in notes
    assert "on port 8082: https://inference-admin.example.com/console/" in installed("control on 1.37").notes
    told = installed("control-sqlite on 1.37").notes
    assert "The first admin is ana@example.com, with the password in the Secret first-admin." in told
    assert "Set router.auth.mode to keys" in told


def test_it_is_scraped_under_a_name_of_its_own() -> None:
    (monitor,) = installed("control on 1.37").of("ServiceMonitor", "control")
    (endpoint,) = monitor["spec"]["endpoints"]

    assert (endpoint["port"], endpoint["path"]) == ("http", "/metrics")
    assert {"targetLabel": "job", "replacement": "inference-api-control"} in endpoint["relabelings"]

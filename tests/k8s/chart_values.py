"""Values to install the chart with, and what comes of them: those that are refused, and those that a test is about."""

from typing import Any

Json = dict[str, Any]

RELEASE, NAMESPACE = "inference-api", "inference"

DIGEST = "6f328c10ea289f25df518b331fb8b9e1ce7e11285b92e6b57d77009fe7c16a1d"
KEY: Json = {"id": "k3v9Qm2XbT7a", "name": "batch", "digest": f"sha256:{DIGEST}", "organisation": "team-a"}
POLICY: Json = {
    "organisations": [{"name": "team-a", "limits": [{"tokens": 20000000, "per": 60}]}],
    "keys": [{**KEY, "expires": "2027-01-31T00:00:00Z"}],
}
# A policy in the values, with keys and limits that each pod counts for itself.
KEYS: Json = {
    "router": {"auth": {"mode": "keys"}, "policy": {"document": POLICY}, "usage": {"mode": "log"}, "currency": "EUR"}
}
POLICY_LATER: Json = {"document": {**POLICY, "keys": []}}
# All from a control plane, with Redis.
CONTROL_PLANE: Json = {
    "registry": {"enabled": False},
    "router": {
        "auth": {"mode": "keys", "pepper": {"existingSecret": "pepper"}},
        "policy": {"fromRegistry": True},
        "registry": {"url": "https://control.example.com:8443", "existingSecret": "service-token"},
        "rateLimits": {"store": "redis", "redis": {"existingSecret": "redis", "port": 6380}},
        "usage": {"mode": "registry"},
        "trustedProxies": ["10.0.0.0/8", "fd00::/8"],
        "networkPolicy": {"egress": {"enabled": True}},
    },
}
# The chart's own, on PostgreSQL.
CONTROL: Json = {
    "registry": {"kind": "control-plane"},
    "router": {"auth": {"mode": "keys", "pepper": {"existingSecret": "pepper"}}, "currency": "EUR"},
    "control": {
        "replicaCount": 2,
        "serviceToken": {"existingSecret": "service-token"},
        "database": {"kind": "postgresql", "existingSecret": "database"},
    },
}
NEXT_IMAGE: Json = {"image": {"tag": "0.2.0"}}
NO_MODELS: Json = {"gpt2": None, "llama-3-8b": None, "mistral-7b": None}
# Each of what the control plane gives is from elsewhere.
CONTROL_OF_OTHERS: Json = {
    "registry": {"kind": "control-plane"},
    "control": {"serviceToken": {"existingSecret": "service-token"}},
    "router": {
        "policy": {"existingSecret": "policy"},
        "usage": {"mode": "log"},
        "settings": {"REPORT_INTERVAL": 2.5},
        "registry": {"existingSecret": "narrow-token"},
    },
}
FORGETFUL: Json = {
    "registry": {"kind": "control-plane"},
    "control": {
        "serviceToken": {"existingSecret": "service-token"},
        "database": {"persistence": {"enabled": False}},
    },
}
# Engines in the namespace of the release, and in another one
LOOKING: Json = {**FORGETFUL, "engines": {"enabled": True}}


def looking(**kubernetes: Any) -> Json:
    """A control plane with the driver `kubernetes` as it is said."""
    return {**LOOKING, "control": {**LOOKING["control"], "engines": {"kubernetes": {"enabled": True, **kubernetes}}}}


def forgetful(**control: Any) -> Json:
    """A control plane with more values of its own."""
    return {**FORGETFUL, "control": {**FORGETFUL["control"], **control}}


PRIVATE_CA: Json = {
    "registry": {"enabled": False},
    "router": {
        "policy": {"fromRegistry": True},
        "usage": {"mode": "registry"},
        "registry": {
            "url": "https://control.example.internal",
            "existingSecret": "service-token",
            "caSecret": "ca",
            "caSecretKey": "bundle",
        },
    },
}


def _control(**control: Any) -> Json:
    """A control plane of the chart, with SQLite."""
    token = {"existingSecret": "service-token"}
    return {"registry": {"kind": "control-plane"}, "control": {"serviceToken": token, **control}}


def _console(**console: Any) -> Json:
    """One whose console is behind an Ingress."""
    given = {"publicUrl": "https://admin.example.com", "ingress": CONSOLE_INGRESS, **console}
    return _control(console=given, networkPolicy={"consoleFrom": [{"podSelector": {}}]})


CONSOLE_INGRESS: Json = {"enabled": True, "hosts": [{"host": "admin.example.com"}]}


def _policy(document: Json) -> Json:
    return {"router": {"policy": {"document": document}}}


# What is refused: the values, and what the one line must say.
# An engine that sleeps at zero, and wakes by what waits for it
ENGINES_KEDA: Json = {
    "enabled": True,
    "keda": {"serverAddress": "http://prometheus"},
    "cache": {"accessModes": ["ReadWriteMany"]},
}
SLEEPER: Json = {
    "models": {
        "gpt2": {
            "hold": 300,
            "max_in_flight": 64,
            "queue": {"timeout": 30, "size": 100, "per_caller": 20},
            "deploy": {"replicas": None, "keda": {"maxReplicas": 3}},
        },
        "mistral-7b": {"deploy": {"replicas": None, "keda": {"minReplicas": 1, "maxReplicas": 2, "requestsPerPod": 7}}},
    }
}
REFUSED: dict[str, tuple[Json, str]] = {
    "a wrong type": ({"router": {"replicaCount": "two"}}, "at '/router/replicaCount': got string"),
    "an unknown key": ({"router": {"replicas": 2}}, "at '/router': additional properties 'replicas' not allowed"),
    "an unknown setting": (
        {"router": {"settings": {"BREAKER_FAILURE": 3}}},
        "at '/router/settings': additional properties 'BREAKER_FAILURE' not allowed",
    ),
    "the tag latest": ({"image": {"tag": "latest"}}, "image.tag is latest, which is another image tomorrow"),
    "a parent's switch, without a parent": ({"enabled": False}, "at '/enabled': value must be true"),
    "an unknown engine": ({"models": {"gpt2": {"engine": "triton"}}}, "at '/models/gpt2/engine': value must be one of"),
    "a setting that is no number": (
        {"router": {"settings": {"BREAKER_FAILURES": "many"}}},
        "at '/router/settings/BREAKER_FAILURES': got string, want integer",
    ),
    "a setting past its limit": (
        {"router": {"settings": {"MAX_ATTEMPTS": 9}}},
        "at '/router/settings/MAX_ATTEMPTS': maximum: got 9, want 3",
    ),
    "a header that is the router's own": (
        {"router": {"settings": {"FORWARD_HEADERS": ["X-Forwarded-For"]}}},
        "at '/router/settings/FORWARD_HEADERS/0'",
    ),
    "bodies that do not fit": (
        {"router": {"limits": {"maxBufferedBytes": 1000}}},
        "router.limits.maxBufferedBytes (1000) is less than one body of router.limits.maxBodyBytes (33554432)",
    ),
    "bodies past the memory": (
        {"router": {"limits": {"maxBufferedBytes": 536870912}}},
        "router.resources.limits.memory (512Mi) has no room for router.limits.maxBufferedBytes (536870912)",
    ),
    "rights of a driver that is off": (
        forgetful(engines={"kubernetes": {"scale": True, "deployments": ["gpt2"]}}),
        "control.engines.kubernetes: scale and logs need enabled: true",
    ),
    "scaling of nothing": (
        forgetful(engines={"kubernetes": {"enabled": True, "scale": True}}),
        "name the Deployments that may be scaled in control.engines.kubernetes.deployments",
    ),
    "scaling of what is elsewhere": (
        looking(scale=True, namespace="models"),
        "the chart runs no engine in the namespace models",
    ),
    "a token for no hub": (forgetful(hub={"existingSecret": "hub"}), "set control.hub.endpoint"),
    "a token for no Prometheus": (forgetful(prometheus={"existingSecret": "p"}), "set control.prometheus.url"),
    "lines for no model": (forgetful(triage={"engineLogs": True}), "set control.triage.model"),
    "credentials that no pod has": (
        {"models": {"gpt2": {"credentials": {"env": "BACKEND_X"}}}},
        "models.gpt2.credentials.env is BACKEND_X, which no pod would have: add it to router.backendTokens",
    ),
    "a file of credentials that no pod has": (
        {"models": {"gpt2": {"credentials": {"file": "/etc/inference-api-tokens/BACKEND_X"}}}},
        "models.gpt2.credentials.file is /etc/inference-api-tokens/BACKEND_X, which no pod would have: add BACKEND_X",
    ),
    "too many models for a ConfigMap": (
        {"models": {f"model-{n}": {"owner": "x" * 100} for n in range(5000)}},
        "as a catalogue, and a ConfigMap holds 1 MiB: keep them in a registry",
    ),
    "an alert that there is not": (
        {"monitoring": {"prometheusRule": {"disabled": ["InferenceRouterDwon"]}}},
        "monitoring.prometheusRule.disabled names InferenceRouterDwon, and there is no such alert",
    ),
    "a Gateway with a typo": (
        {"router": {"httpRoute": {"enabled": True, "parentRefs": [{"name": "a", "namspace": "b"}]}}},
        "at '/router/httpRoute/parentRefs/0': additional properties 'namspace' not allowed",
    ),
    "a label that is none": (
        {"commonLabels": {"x y": "z"}},
        "at '/commonLabels': additional properties 'x y' not allowed",
    ),
    "addresses of a load balancer that there is not": (
        {"router": {"service": {"loadBalancerSourceRanges": ["10.0.0.0/8"]}}},
        "router.service.loadBalancerClass and loadBalancerSourceRanges are for the type LoadBalancer",
    ),
    "a traffic policy of what stays inside": (
        {"router": {"service": {"externalTrafficPolicy": "Local"}}},
        "router.service.externalTrafficPolicy is for the types LoadBalancer and NodePort",
    ),
    "a registry to wait for that there is not": (
        {"registry": {"enabled": False}, "router": {"registry": {"required": True}}},
        "router.registry.required is set, and there is no registry to wait for",
    ),
    "metrics on the port of changes": (
        {"registry": {"opsPort": 8081}},
        "registry.service.port and registry.opsPort are both 8081",
    ),
    "the tag latest, of one engine": (
        {"engines": {"enabled": True}, "models": {"gpt2": {"deploy": {"image": {"tag": "latest"}}}}},
        "models.gpt2.deploy.image.tag is latest, which is another image tomorrow",
    ),
    "keys without a policy": (
        {"router": {"auth": {"mode": "keys"}}},
        "router.auth.mode is keys, and there is no policy with keys: give router.policy.document, existingSecret or",
    ),
    "a policy from two places": (
        {"router": {"policy": {"document": POLICY, "existingSecret": "policy"}}},
        "router.policy.document and router.policy.existingSecret are all given, and there is one policy",
    ),
    "a policy of a registry that there is not": (
        {"registry": {"enabled": False}, "router": {"policy": {"fromRegistry": True}}},
        "router.policy.fromRegistry: there is no control plane: set router.registry.url",
    ),
    "usage to a registry that there is not": (
        {"registry": {"enabled": False}, "router": {"usage": {"mode": "registry"}}},
        "router.usage.mode registry: there is no control plane: set router.registry.url",
    ),
    "policy and usage of the chart's own registry": (
        {"router": {"policy": {"fromRegistry": True}, "usage": {"mode": "registry"}}},
        "router.policy.fromRegistry and router.usage.mode registry: the chart's own registry has models only",
    ),
    "Redis without its URL": (
        {"router": {"policy": {"existingSecret": "policy"}, "rateLimits": {"store": "redis"}}},
        "router.rateLimits.store is redis: name the Secret with its URL in router.rateLimits.redis.existingSecret",
    ),
    "Redis without limits": (
        {"router": {"rateLimits": {"store": "redis", "redis": {"existingSecret": "redis"}}}},
        "router.rateLimits.store is redis, and there is no policy with limits to count",
    ),
    "a share of nothing": (
        {"router": {"rateLimits": {"share": 0}}},
        "at '/router/rateLimits/share': minimum: got 0, want 1",
    ),
    "keys that go to backends": (
        {**KEYS, "models": {"gpt2": {"credentials": "passthrough"}}},
        "models.gpt2.credentials is passthrough, and with router.auth.mode keys what clients send is a key of",
    ),
    "a spool that one pod can have": (
        {
            **CONTROL_PLANE,
            "router": {
                **CONTROL_PLANE["router"],
                "usage": {
                    "mode": "registry",
                    "spool": {"persistence": {"enabled": True, "accessModes": ["ReadWriteOnce"]}},
                },
            },
        },
        "router.usage.spool.persistence.accessModes is ReadWriteOnce, and several pods share the volume",
    ),
    "a proxy that is no address": (
        {"router": {"trustedProxies": ["proxy.example.com"]}},
        "at '/router/trustedProxies/0'",
    ),
    "a control plane without a token": (
        {"registry": {"kind": "control-plane"}},
        "registry.kind is control-plane: name a Secret with the token of the routers in "
        "control.serviceToken.existingSecret; "
        "to make one: kubectl --namespace inference create secret generic inference-api-control-token "
        "--from-literal=token=$(openssl rand -hex 32)",
    ),
    "two pods with one file": (
        _control(replicaCount=2),
        "control.replicaCount is 2, and a file of SQLite has one owner: set it to 1, or control.database.kind to",
    ),
    "PostgreSQL without its URL": (
        _control(database={"kind": "postgresql"}),
        "control.database.kind is postgresql: name the Secret with its URL in control.database.existingSecret",
    ),
    "an unknown database": (_control(database={"kind": "mysql"}), "at '/control/database/kind': value must be one of"),
    "an unknown registry": ({"registry": {"kind": "control"}}, "at '/registry/kind': value must be one of"),
    "the API on the port of routers": (
        _control(ports={"api": 8081}),
        "control.ports.http and control.ports.api are both 8081: API and console need a port of their own",
    ),
    "OpenID Connect without a way back": (
        _control(oidc={"issuer": "https://id.example.com", "clientId": "ia"}),
        "control.oidc.issuer is given: set control.console.publicUrl, where it sends people back to",
    ),
    "OpenID Connect for nobody": (
        _control(oidc={"issuer": "https://id.example.com"}, console={"publicUrl": "https://admin.example.com"}),
        "control.oidc.issuer is given: set control.oidc.clientId",
    ),
    "a group that would be two": (
        _control(oidc={"roles": {"admin": ["a,b=viewer"]}}),
        "at '/control/oidc/roles/admin/0'",
    ),
    "no way to log in": (
        _control(passwordLogin=False),
        "control.passwordLogin is false, and nobody could log in: set control.oidc.issuer",
    ),
    "a first admin without a password": (
        _control(bootstrap={"email": "ana@example.com"}),
        "control.bootstrap needs both email and existingSecret, or neither",
    ),
    "a first admin without passwords": (
        _control(
            bootstrap={"email": "ana@example.com", "existingSecret": "admin"},
            passwordLogin=False,
            oidc={"issuer": "https://id.example.com", "clientId": "ia"},
            console={"publicUrl": "https://admin.example.com"},
        ),
        "control.bootstrap gives the first admin a password, and control.passwordLogin is false",
    ),
    "a database past the chart": (
        _control(extraEnv=[{"name": "CONTROL_PLANE_DATABASE_URL", "value": "postgresql://db/x"}]),
        "control.extraEnv sets CONTROL_PLANE_DATABASE_URL, which control.database is for",
    ),
    "a console on the router's host": (
        {**_console(), "router": {"ingress": {"enabled": True, "hosts": [{"host": "Admin.example.com"}]}}},
        "control.console.ingress: admin.example.com is the router's host, too, and the console must have one of its",
    ),
    "a console on the host of the router's route": (
        {
            **_console(),
            "router": {
                "httpRoute": {"enabled": True, "parentRefs": [{"name": "a"}], "hostnames": ["admin.example.com"]}
            },
        },
        "control.console.ingress: admin.example.com is the router's host, too",
    ),
    "a console without its URL": (
        _console(publicUrl=""),
        "control.console.ingress: set control.console.publicUrl, the URL that browsers use",
    ),
    "a console at another URL": (
        _console(publicUrl="https://console.example.com"),
        "control.console.publicUrl (https://console.example.com) is on none of the hosts of control.console.ingress",
    ),
    "a URL of a console that is no origin": (
        _console(publicUrl="https://admin.example.com/console"),
        "at '/control/console/publicUrl'",
    ),
    "a console without hosts": (
        _console(ingress={"enabled": True}),
        "control.console.ingress needs control.console.ingress.hosts",
    ),
    "a console behind no Gateway": (
        _console(ingress={}, httpRoute={"enabled": True, "parentRefs": [{"name": "a"}]}),
        "control.console.httpRoute needs parentRefs, the Gateways that it attaches to, and hostnames",
    ),
    "a console that no Service has": (
        _console(enabled=False),
        "control.console.ingress: control.console.enabled is false, so that no Service has its port",
    ),
    "a console that nobody may reach": (
        {**_console(), "control": {**_console()["control"], "networkPolicy": {}}},
        "control.console.ingress: nobody could connect; name the namespace of what connects",
    ),
    "a control plane of others beside our own": (
        {**_control(), "router": {"registry": {"url": "http://control"}}},
        "router.registry.url is set, so nobody would use the chart's own registry",
    ),
    "a model with the name of the control plane": (
        {**_control(), "fullnameOverride": "models", "models": {"models-control": {"engine": "tgi"}}},
        "models.models-control: its Service would be named models-control, as one of the release itself",
    ),
    "a currency that is none": ({"router": {"currency": "euro"}}, "at '/router/currency'"),
    "a key in the clear": (
        _policy({**POLICY, "keys": [{**KEY, "key": "sk-ia-..."}]}),
        "at '/router/policy/document/keys/0': additional properties 'key' not allowed",
    ),
    "a key of nobody": (
        _policy({"keys": [KEY]}),
        "router.policy.document.keys.0.organisation: team-a is not in organisations",
    ),
    "two keys with one id": (
        _policy({**POLICY, "keys": [KEY, {**KEY, "digest": f"sha256:{'0' * 64}"}]}),
        "router.policy.document.keys.1.id: k3v9Qm2XbT7a is given twice",
    ),
    "two keys with one secret": (
        _policy({**POLICY, "keys": [KEY, {**KEY, "id": "000000000000"}]}),
        "router.policy.document.keys.1: its digest is given twice, and each key has its own",
    ),
    "an organisation twice": (
        _policy({"organisations": [{"name": "team-a"}, {"name": "team-a"}]}),
        "router.policy.document.organisations.1.name: team-a is given twice",
    ),
    "digests without their pepper": (
        _policy({"keys": [{"id": KEY["id"], "name": "batch", "digest": f"hmac-sha256:{DIGEST}"}]}),
        "router.policy.document has hmac-sha256 digests, which nobody can check without their pepper",
    ),
    "too many keys for a Secret": (
        _policy({"keys": [{"id": f"{n:012d}", "name": "n" * 100, "digest": f"sha256:{n:064x}"} for n in range(5000)]}),
        "and a Secret holds 1 MiB: keep it in a control plane, and set router.policy.fromRegistry",
    ),
    "an HPA with KEDA": (
        {"router": {"autoscaling": {"enabled": True}, "keda": {"enabled": True, "serverAddress": "http://prometheus"}}},
        "router.autoscaling.enabled and router.keda.enabled exclude each other",
    ),
    "a drain shorter than a stream": (
        {"router": {"timeouts": {"stream": 3600}}},
        "router.drain.timeoutSeconds (570) is shorter than the longest request (3600 s",
    ),
    "a drain shorter than a model's answer": (
        {"models": {"gpt2": {"timeouts": {"total": 900.5}}}},
        "router.drain.timeoutSeconds (570) is shorter than the longest request (901 s",
    ),
    "both sides of a disruption budget": (
        {"router": {"podDisruptionBudget": {"minAvailable": 1}}},
        "router.podDisruptionBudget takes minAvailable or maxUnavailable, not both",
    ),
    "more pods at least than at most": (
        {"router": {"autoscaling": {"enabled": True, "minReplicas": 20}}},
        "router.autoscaling.minReplicas (20) is more than router.autoscaling.maxReplicas (10)",
    ),
    "an HPA without a CPU request": (
        {"router": {"autoscaling": {"enabled": True}, "resources": {"requests": {"cpu": None}}}},
        "router.autoscaling needs router.resources.requests.cpu",
    ),
    "KEDA without Prometheus": ({"router": {"keda": {"enabled": True}}}, "router.keda needs router.keda.serverAddress"),
    "an engine with KEDA without Prometheus": (
        {
            "engines": {"enabled": True, "cache": ENGINES_KEDA["cache"]},
            "models": {"gpt2": SLEEPER["models"]["gpt2"]},
        },
        "models.gpt2.deploy.keda needs engines.keda.serverAddress, the URL of Prometheus",
    ),
    "an engine whose number two decide on": (
        {"engines": ENGINES_KEDA, "models": {"gpt2": {"hold": 60, "deploy": {"keda": {"maxReplicas": 2}}}}},
        "models.gpt2.deploy.keda and models.gpt2.deploy.replicas exclude each other: set replicas to null",
    ),
    "an engine at zero whose requests are refused": (
        {"engines": ENGINES_KEDA, "models": {"gpt2": {"deploy": {"replicas": None, "keda": {"maxReplicas": 2}}}}},
        "models.gpt2.deploy.keda scales it to zero, where requests would be refused: set models.gpt2.hold",
    ),
    "an engine with more pods at least than at most": (
        {
            "engines": ENGINES_KEDA,
            "models": {"gpt2": {"deploy": {"replicas": None, "keda": {"minReplicas": 3, "maxReplicas": 2}}}},
        },
        "models.gpt2.deploy.keda.minReplicas (3) is more than its maxReplicas (2)",
    ),
    "an engine that scales beyond a volume of one node": (
        {
            "engines": {**ENGINES_KEDA, "cache": {"accessModes": ["ReadWriteOnce"]}},
            "models": {"gpt2": SLEEPER["models"]["gpt2"]},
        },
        "models.gpt2.deploy.keda.maxReplicas is 3, and a cache that is ReadWriteOnce is on one node",
    ),
    "a queue without a limit": (
        {"models": {"gpt2": {"queue": {"timeout": 30, "size": 10}}}},
        "models.gpt2.queue needs models.gpt2.max_in_flight: at that many requests others wait",
    ),
    "two registries": (
        {"router": {"registry": {"url": "http://registry"}}},
        "router.registry.url is set, so nobody would use the chart's own registry",
    ),
    "nothing to serve": (
        {"registry": {"enabled": False}, "models": {"llama-3-8b": None, "mistral-7b": None, "gpt2": None}},
        "there is nothing to serve",
    ),
    "a watch without the right to it": (
        {"router": {"discovery": {"mode": "endpointslices"}, "rbac": {"create": False}}},
        "router.discovery.mode endpointslices needs the right to watch them",
    ),
    "an Ingress without hosts": (
        {"router": {"ingress": {"enabled": True}}},
        "router.ingress needs router.ingress.hosts",
    ),
    "a route without a Gateway": (
        {"router": {"httpRoute": {"enabled": True}}},
        "router.httpRoute needs router.httpRoute.parentRefs",
    ),
    "traces to nowhere": (
        {"monitoring": {"otel": {"enabled": True}}},
        "monitoring.otel needs monitoring.otel.endpoint",
    ),
    "replicas on a volume of one node": (
        {"engines": {"enabled": True}, "models": {"gpt2": {"deploy": {"replicas": 2}}}},
        "models.gpt2.deploy.replicas is 2, and a cache that is ReadWriteOnce is on one node",
    ),
    "an engine that the chart does not run": (
        {"engines": {"enabled": True}, "models": {"gpt2": {"engine": "sglang"}}},
        "models.gpt2.deploy: the chart runs vllm and tgi, not the engine sglang",
    ),
    "a Service that begins with a digit": (
        {"engines": {"enabled": True}, "models": {"3b": {"deploy": {"model": "some/3b"}}}},
        'models.3b.deploy: its Service would be named "3b", and such names begin with a letter',
    ),
    "all pods always there": (
        {"router": {"podDisruptionBudget": {"minAvailable": 2, "maxUnavailable": None}}},
        "router.podDisruptionBudget.minAvailable (2) is all of the 2 pods that there may be: no node could ever be",
    ),
    "all pods always there, in percent": (
        {"router": {"podDisruptionBudget": {"minAvailable": "100%", "maxUnavailable": None}}},
        "router.podDisruptionBudget.minAvailable (100%) is all of the 2 pods that there may be",
    ),
    "all pods always there, rounded up": (
        {"router": {"replicaCount": 1, "podDisruptionBudget": {"minAvailable": "50%", "maxUnavailable": None}}},
        "router.podDisruptionBudget.minAvailable (50%) is all of the 1 pods that there may be",
    ),
    "as many pods always there as a scaler may leave": (
        {
            "router": {
                "replicaCount": 9,
                "autoscaling": {"enabled": True, "minReplicas": 3},
                "podDisruptionBudget": {"minAvailable": 3, "maxUnavailable": None},
            }
        },
        "router.podDisruptionBudget.minAvailable (3) is all of the 3 pods that there may be",
    ),
    "one port for two things": (
        {"router": {"ports": {"ops": 8000}}},
        "router.ports.http and router.ports.ops are both 8000",
    ),
    "a setting past the chart": (
        {"router": {"extraEnv": [{"name": "INFERENCE_API_DRAIN_TIMEOUT", "value": "9999"}]}},
        "router.extraEnv sets INFERENCE_API_DRAIN_TIMEOUT, which would go past the value that the chart computes with",
    ),
    "a label of the chart's own": (
        {"commonLabels": {"app.kubernetes.io/name": "mine"}},
        "at '/commonLabels",
    ),
    "a watch without a token": (
        {"router": {"discovery": {"mode": "endpointslices"}, "serviceAccount": {"automount": False}}},
        "router.discovery.mode endpointslices needs the token of its service account",
    ),
    "a watch in a namespace without the right to it": (
        {
            "router": {"discovery": {"mode": "endpointslices", "namespaces": ["others"]}},
            "models": {
                "gpt2": {"backends": [{"url": "http://gpt2.models.svc.cluster.local:8000", "discovery": "dns"}]}
            },
        },
        "models.gpt2: http://gpt2.models.svc.cluster.local:8000 is in the namespace models, where the router may not",
    ),
    "a watch in a namespace without the right to it, for short": (
        {
            "router": {"discovery": {"mode": "endpointslices"}},
            "models": {"gpt2": {"backends": [{"url": "http://gpt2.models", "discovery": "dns"}]}},
        },
        "models.gpt2: http://gpt2.models is in the namespace models",
    ),
    "an engine that nobody would ask": (
        {"engines": {"enabled": True}, "models": {"gpt2": {"backends": [{"url": "http://gpt2.example.com"}]}}},
        "models.gpt2 has deploy, and backends that do not lead to it, so nobody would ask the engine",
    ),
    "a model with the name of the release": (
        {"models": {"Inference_API": {}}},
        "models.Inference_API: its Service would be named inference-api, as one of the release itself",
    ),
    "a model with the name of the registry": (
        {"fullnameOverride": "models", "models": {"models-registry": {"engine": "tgi"}}},
        "models.models-registry: its Service would be named models-registry, as one of the release itself",
    ),
    "two models with one Service": (
        {"engines": {"enabled": True}, "models": {"GPT2": {"deploy": {"model": "openai-community/gpt2"}}}},
        "models.GPT2 and models.gpt2 would have the same Service, gpt2",
    ),
}

# What the router would refuse in its catalogue: values of `models`, and what the chart says. The app is asked as well.
BAD_MODELS: dict[str, tuple[Json, str]] = {
    "an alias that is a name": (
        {"gpt2": {"aliases": ["mistral-7b"]}},
        "models.gpt2 and models.mistral-7b share the name mistral-7b",
    ),
    "an alias twice": (
        {"gpt2": {"aliases": ["small"]}, "mistral-7b": {"aliases": ["small"]}},
        "models.gpt2 and models.mistral-7b share the name small",
    ),
    "a backend twice": (
        {"gpt2": {"backends": [{"url": "http://a:1/"}, {"url": "http://a:1"}]}},
        "models.gpt2 lists the backend http://a:1 twice",
    ),
    "metadata of the cloud": (
        {"gpt2": {"backends": [{"url": "http://169.254.169.254"}]}},
        "models.gpt2: the backend http://169.254.169.254 is a link-local, metadata or unusable address",
    ),
    "metadata of the cloud by name": (
        {"gpt2": {"backends": [{"url": "http://metadata.google.internal/x"}]}},
        "models.gpt2: the backend http://metadata.google.internal/x is a link-local, metadata or unusable address",
    ),
    "everywhere": (
        {"gpt2": {"backends": [{"url": "http://0.0.0.0:8000"}]}},
        "models.gpt2: the backend http://0.0.0.0:8000 is a link-local, metadata or unusable address",
    ),
    "an address to look up": (
        {"gpt2": {"backends": [{"url": "http://10.0.0.1:8000", "discovery": "dns"}]}},
        "models.gpt2: the backend http://10.0.0.1:8000 has discovery dns, which needs a host name",
    ),
    "a password in a URL": (
        {"gpt2": {"backends": [{"url": "http://me:secret@a"}]}},
        "at '/models/gpt2/backends/0/url'",
    ),
    "a query in a URL": ({"gpt2": {"backends": [{"url": "http://a/?x=1"}]}}, "at '/models/gpt2/backends/0/url'"),
    "a weight past the limit": (
        {"gpt2": {"backends": [{"url": "http://a", "weight": 1001}]}},
        "at '/models/gpt2/backends/0/weight'",
    ),
    "no served name": ({"gpt2": {"served_model_name": ""}}, "at '/models/gpt2/served_model_name'"),
}
# What somebody else has made before.
OF_OTHERS: Json = {
    f"/api/v1/namespaces/{NAMESPACE}/services": {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": "gpt2", "annotations": {"meta.helm.sh/release-name": "other"}},
        "spec": {"ports": [{"port": 80}]},
    }
}
_SECRET: Json = {"auth": {"existingSecret": "token"}}
# What is installed, what is then wanted, and what the chart says of that.
LIVE: dict[str, tuple[Json, Json, str]] = {
    "a smaller registry": (
        {"registry": _SECRET},
        {"registry": {**_SECRET, "persistence": {"size": "500Mi"}}},
        "registry.persistence.size (500Mi) is less than the volume has (1Gi): the claim inference-api-registry is",
    ),
    "another class of the registry": (
        {"registry": _SECRET},
        {"registry": {**_SECRET, "persistence": {"storageClassName": "fast"}}},
        "registry.persistence.storageClassName (fast) is not that of the volume (standard): the claim",
    ),
    "the default class from now on": (
        {"registry": {**_SECRET, "persistence": {"storageClassName": "fast"}}},
        {"registry": _SECRET},
        "registry.persistence.storageClassName is empty, and was fast: the claim",
    ),
    "other access to the registry": (
        {"registry": _SECRET},
        {"registry": {**_SECRET, "persistence": {"accessModes": ["ReadWriteOncePod"]}}},
        "registry.persistence.accessModes (ReadWriteOncePod) are not those of the volume (ReadWriteOnce): the claim",
    ),
    "a smaller control plane": (
        _control(),
        _control(database={"persistence": {"size": "1Gi"}}),
        "control.database.persistence.size (1Gi) is less than the volume has (5Gi): the claim inference-api-control is",
    ),
    "shared caches from now on": (
        {"engines": {"enabled": True}, "models": {"llama-3-8b": None, "mistral-7b": None}},
        {
            "engines": {"enabled": True, "cache": {"accessModes": ["ReadWriteMany"]}},
            "models": {"llama-3-8b": None, "mistral-7b": None},
        },
        "engines.cache.accessModes (ReadWriteMany) are not those of the volume (ReadWriteOnce): the claim gpt2-cache "
        "is there, and a claim cannot be changed so: take it back, or make another claim, copy what is needed, and "
        "name it in models.gpt2.deploy.existingClaim",
    ),
    "a name from now on": (
        {},
        {"nameOverride": "gateway"},
        "nameOverride and fullnameOverride are for a first install: the router is the Deployment inference-api",
    ),
    "another full name": (
        {},
        {"fullnameOverride": "gateway"},
        "nameOverride and fullnameOverride are for a first install: the router is the Deployment inference-api",
    ),
}
# What changes and may: the same, without a word of the chart.
CHANGES: dict[str, tuple[Json, Json]] = {
    "a larger registry": (
        {"registry": _SECRET},
        {"registry": {**_SECRET, "persistence": {"size": "2Gi", "annotations": {"backup": "daily"}}}},
    ),
    "no volume any more": ({"registry": _SECRET}, {"registry": {**_SECRET, "persistence": {"enabled": False}}}),
    "a volume from now on": ({"registry": {**_SECRET, "persistence": {"enabled": False}}}, {"registry": _SECRET}),
    "a Secret from now on": ({}, {"registry": _SECRET}),
    "another claim": ({"registry": _SECRET}, {"registry": {**_SECRET, "persistence": {"existingClaim": "mine"}}}),
    "models": ({}, {"models": {"gpt2": None}}),
    "a control plane from now on": ({}, _control()),
    "the stub again": (_control(), {}),
    "PostgreSQL from now on": (_control(), CONTROL),
    "more of a control plane, and another Job": (
        CONTROL,
        {**CONTROL, "control": {**CONTROL["control"], "replicaCount": 3, "migrations": {"backoffLimit": 1}}},
    ),
}

# Whatever is in files/ at this time, the templates must cope with what may be there.
RULE = {
    "alert": "Some",
    "expr": 'up{job="x"} == 0',
    "annotations": {"summary": "{{ $value }} of {{ $labels.pod }}", "runbook_url": "k8s/runbook.md#some"},
}
RULES = {"groups": [{"name": "first", "rules": [RULE, RULE | {"alert": "Unwanted"}]}, {"name": "second", "rules": []}]}
# The claim that a StatefulSet made for the registry, before it was a Deployment.
OLD_CLAIM = "data-inference-api-registry-0"
VARIABLES: Json = {
    "engines": {"enabled": True, "extraEnv": [{"name": "HF_HOME", "value": "/models"}]},
    "router": {
        "backendTokens": {"BACKEND_TOKEN": {"secret": "s", "key": "k"}},
        "extraEnv": [{"name": "BACKEND_TOKEN", "value": "mine"}, {"name": "OTEL_TRACES_SAMPLER", "value": "always_on"}],
    },
    "registry": {"auth": {"existingSecret": "s"}, "extraEnv": [{"name": "REGISTRY_STUB_TOKEN", "value": "mine"}]},
    "monitoring": {"otel": {"enabled": True, "endpoint": "http://collector:4318"}},
}
SCALED_BY_OTHERS: Json = {
    "router": {"replicaCount": None},
    "engines": {"enabled": True},
    "models": {"gpt2": {"deploy": {"replicas": None}}},
}
_NEXT = {"registry": "mirror.example.com", "tag": "v0.33.0"}
CANARY: Json = {
    "engines": {
        "enabled": True,
        "images": {"vllm": {"digest": f"sha256:{'0' * 64}"}},
        "cache": {"enabled": False},
    },
    "models": {
        "gpt2": {
            "backends": [
                {"url": f"http://gpt2.{NAMESPACE}.svc:8000", "discovery": "dns", "weight": 9},
                {"url": f"http://gpt2-next.{NAMESPACE}.svc:8000", "discovery": "dns"},
            ],
            "deploy": {"strategy": {"rollingUpdate": {"maxUnavailable": 0, "maxSurge": 1}}},
        },
        "gpt2-next": {
            "served_model_name": "gpt2",
            "deploy": {"model": "openai-community/gpt2", "image": _NEXT, "cacheSize": "5Gi"},
        },
    },
}
# Models that stand for others, and those that others answer for
VIRTUAL: Json = {
    "models": {
        "chat": {"split": {"variants": {"gpt2": 90, "mistral-7b": 10}, "sticky": "user"}},
        "fastest": {"race": {"members": ["gpt2", "mistral-7b"], "stagger": 0.5}},
        "sure": {"consensus": {"members": ["gpt2", "mistral-7b", "llama-3-8b"], "quorum": 2}, "cache": {"ttl": 60}},
        "gpt2": {
            "fallbacks": ["mistral-7b"],
            "context_fallbacks": ["mistral-7b"],
            "hedge": {"after": "p95", "budget": 0.05},
            "shadow": {"to": "llama-3-8b", "sample": 0.05},
        },
    }
}
MESH: Json = {
    "networkPolicy": {"extraPorts": [15008]},
    "engines": {"enabled": True, "networkPolicy": {"egress": {"enabled": True}}},
    "router": {"networkPolicy": {"egress": {"enabled": True}}},
}
PARENT: Json = {
    "apiVersion": "v2",
    "name": "parent",
    "version": "0.1.0",
    "dependencies": [{"name": "inference-api", "version": ">=0.0.0-0", "condition": "inference-api.enabled"}],
}
EVERYTHING = {
    name: {"enabled": True} for name in ("serviceMonitor", "enginePodMonitor", "prometheusRule", "dashboards")
}
# Names that selectors have.
LABELS = {"app.kubernetes.io/name": "mine", "app.kubernetes.io/instance": "mine", "app.kubernetes.io/component": "mine"}
DASHBOARD = '{"title": "{{model_name}} $__rate_interval", "panels": []}'

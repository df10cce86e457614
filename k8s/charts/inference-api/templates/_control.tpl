{{/* The registry: which kind of it the chart runs, and what its control plane is told. */}}

{{/* Not empty: the chart runs the stub. */}}
{{- define "inference-api.stub" -}}
{{- with .Values.registry }}{{ if and .enabled (eq .kind "stub") }}true{{ end }}{{ end -}}
{{- end -}}

{{/* Not empty: the chart runs a control plane. */}}
{{- define "inference-api.control" -}}
{{- with .Values.registry }}{{ if and .enabled (eq .kind "control-plane") }}true{{ end }}{{ end -}}
{{- end -}}

{{- define "inference-api.control.fullname" -}}
{{- printf "%s-control" (include "inference-api.fullname" .) -}}
{{- end -}}

{{/* Not empty: it keeps all in SQLite, on a volume. */}}
{{- define "inference-api.control.sqlite" -}}
{{- if and (include "inference-api.control" .) (eq .Values.control.database.kind "sqlite") }}true{{ end -}}
{{- end -}}

{{/* The claim of that volume; empty: it is an emptyDir. */}}
{{- define "inference-api.control.claim" -}}
{{- $claim := .Values.control.database.persistence -}}
{{- if and (include "inference-api.control.sqlite" .) (or $claim.enabled $claim.existingClaim) -}}
{{- $claim.existingClaim | default (include "inference-api.control.fullname" .) -}}
{{- end -}}
{{- end -}}

{{/* Not empty: a Job migrates the database. */}}
{{- define "inference-api.control.migrates" -}}
{{- if and (include "inference-api.control" .) (eq .Values.control.database.kind "postgresql") .Values.control.migrations.enabled }}true{{ end -}}
{{- end -}}

{{/* Where people find the console; by default where `kubectl port-forward` has it. */}}
{{- define "inference-api.control.publicUrl" -}}
{{- .Values.control.console.publicUrl | default (printf "http://127.0.0.1:%d" (int .Values.control.ports.api)) | trimSuffix "/" -}}
{{- end -}}

{{/* Where the engines are that it looks at. */}}
{{- define "inference-api.control.enginesNamespace" -}}
{{- .Values.control.engines.kubernetes.namespace | default .Release.Namespace -}}
{{- end -}}

{{/* The Deployments that it may scale, as JSON {names}: those that are named, else the chart's own. */}}
{{- define "inference-api.control.scaled" -}}
{{- $names := .Values.control.engines.kubernetes.deployments -}}
{{- if and (not $names) (eq (include "inference-api.control.enginesNamespace" .) .Release.Namespace) -}}
{{- range $name, $model := include "inference-api.deployed" . | fromJson -}}
{{- if not $model.deploy.keda }}{{ $names = append $names (include "inference-api.slug" $name) }}{{ end -}}
{{- end -}}
{{- end -}}
{{- dict "names" $names | toJson -}}
{{- end -}}

{{/* A variable of a Secret's; dict name, source {existingSecret, existingSecretKey}. */}}
{{- define "inference-api.secretVariable" -}}
- name: {{ .name }}
  valueFrom: {secretKeyRef: {name: {{ .source.existingSecret | quote }}, key: {{ .source.existingSecretKey | quote }}}}
{{- end -}}

{{/* The environment of whatever opens the database, as a list. */}}
{{- define "inference-api.control.databaseEnv" -}}
{{- $control := .Values.control -}}
- name: CONTROL_PLANE_LOG_FORMAT
  value: json
- name: CONTROL_PLANE_LOG_LEVEL
  value: {{ $control.logLevel }}
{{- if include "inference-api.control.sqlite" . }}
- name: CONTROL_PLANE_DATABASE_URL
  value: sqlite:////data/control-plane.sqlite3
{{- else }}
{{ include "inference-api.secretVariable" (dict "name" "CONTROL_PLANE_DATABASE_URL" "source" $control.database) }}
{{- if $control.database.caSecret }}
- name: PGSSLMODE
  value: verify-full
- name: PGSSLROOTCERT
  value: /etc/control-plane-database/ca.crt
{{- end }}
{{- end }}
{{- end -}}

{{/* The environment of `control-plane serve`, as a list. CONTROL_PLANE_* are its settings. */}}
{{- define "inference-api.control.env" -}}
{{- $control := .Values.control -}}
{{- $settings := dict
  "HOST" .Values.router.host
  "PORT" $control.ports.http
  "API_PORT" $control.ports.api
  "PUBLIC_URL" (include "inference-api.control.publicUrl" .)
  "ROUTER_URL" (printf "http://%s:%d" (include "inference-api.fullname" .) (int .Values.router.service.port))
  "MIGRATE" (include "inference-api.control.sqlite" . | empty | ternary "check" "auto")
  "PASSWORD_LOGIN" ($control.passwordLogin | ternary "on" "off")
  "HOURLY_DAYS" $control.usage.hourlyDays
-}}
{{- with $control.console.routerUrl }}{{ $_ := set $settings "ROUTER_PUBLIC_URL" . }}{{ end -}}
{{- with $control.console.logUrl }}{{ $_ := set $settings "LOG_URL" . }}{{ end -}}
{{- with $control.console.traceUrl }}{{ $_ := set $settings "TRACE_URL" . }}{{ end -}}
{{- with $control.usage.days }}{{ $_ := set $settings "USAGE_DAYS" . }}{{ end -}}
{{- with .Values.router.currency }}{{ $_ := set $settings "CURRENCY" . }}{{ end -}}
{{- with $control.trustedProxies | default .Values.router.trustedProxies }}{{ $_ := set $settings "TRUSTED_PROXIES" . }}{{ end -}}
{{- with $control.bootstrap.email }}{{ $_ := set $settings "ADMIN_EMAIL" . }}{{ end -}}
{{- if $control.bootstrap.existingSecret }}{{ $_ := set $settings "ADMIN_PASSWORD_FILE" "/etc/control-plane-bootstrap/password" }}{{ end -}}
{{- with $control.engines.kubernetes -}}
{{- if .enabled -}}
{{- $_ := set $settings "KUBERNETES_NAMESPACE" (include "inference-api.control.enginesNamespace" $) -}}
{{- $_ := set $settings "KUBERNETES_SCALE" (.scale | ternary "on" "off") -}}
{{- $_ := set $settings "KUBERNETES_LOGS" (.logs | ternary "on" "off") -}}
{{- end -}}
{{- end -}}
{{- with $control.modelTestEverySeconds }}{{ $_ := set $settings "MODEL_TEST_EVERY" . }}{{ end -}}
{{- with $control.modelRoots }}{{ $_ := set $settings "MODEL_ROOTS" . }}{{ end -}}
{{- with $control.triage.model }}{{ $_ := set $settings "TRIAGE_MODEL" . }}{{ end -}}
{{- if $control.triage.engineLogs }}{{ $_ := set $settings "TRIAGE_ENGINE_LOGS" "on" }}{{ end -}}
{{- $secrets := dict "SERVICE_TOKEN" $control.serviceToken "KEY_PEPPER" .Values.router.auth.pepper -}}
{{- with $control.hub }}{{ if .endpoint }}{{ $_ := set $settings "HUB_ENDPOINT" .endpoint }}{{ $_ := set $secrets "HUB_TOKEN" . }}{{ end }}{{ end -}}
{{- with $control.prometheus }}{{ if .url }}{{ $_ := set $settings "PROMETHEUS_URL" .url }}{{ $_ := set $secrets "PROMETHEUS_TOKEN" . }}{{ end }}{{ end -}}
{{- with $control.oidc -}}
{{- if .issuer -}}
{{- $roles := list -}}
{{- range $role, $groups := .roles }}{{ range $groups }}{{ $roles = append $roles (printf "%s=%s" . $role) }}{{ end }}{{ end -}}
{{- $_ := set $settings "OIDC_ISSUER" .issuer -}}
{{- $_ := set $settings "OIDC_CLIENT_ID" .clientId -}}
{{- $_ := set $settings "OIDC_GROUPS_CLAIM" .groupsClaim -}}
{{- with $roles }}{{ $_ := set $settings "OIDC_ROLES" . }}{{ end -}}
{{- $_ := set $secrets "OIDC_CLIENT_SECRET" . -}}
{{- end -}}
{{- end -}}
{{ include "inference-api.control.databaseEnv" . }}
{{- range $name, $value := $settings }}
- name: CONTROL_PLANE_{{ $name }}
  value: {{ include "inference-api.scalar" $value | quote }}
{{- end }}
{{- range $name, $source := $secrets }}
{{- if $source.existingSecret }}
{{ include "inference-api.secretVariable" (dict "name" (printf "CONTROL_PLANE_%s" $name) "source" $source) }}
{{- end }}
{{- end }}
{{- with $control.extraEnv }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{/* What a container of the Deployment does before it serves, as a shell script. */}}
{{- define "inference-api.control.prepare" -}}
{{- if include "inference-api.control.sqlite" . -}}
control-plane migrate
{{- else -}}
# 1: the schema is behind, until somebody migrates it. Anything else ends it, and is in its log.
while :; do control-plane migrate --check && break; code=$?; [ $code = 1 ] || exit $code; sleep 2; done
{{- end }}
{{- if .Values.models }}
control-plane export models --output /tmp/models.yaml
grep -q name: /tmp/models.yaml || control-plane import /etc/inference-api/catalogue.yaml
{{- end }}
{{- end -}}

{{/* What containers of the Deployment have in common. */}}
{{- define "inference-api.control.mounts" -}}
- {name: catalogue, mountPath: /etc/inference-api, readOnly: true}
{{- if include "inference-api.control.sqlite" . }}
- {name: data, mountPath: /data}
{{- end }}
{{- if .Values.control.bootstrap.existingSecret }}
- {name: bootstrap, mountPath: /etc/control-plane-bootstrap, readOnly: true}
{{- end }}
{{ include "inference-api.control.databaseMounts" . }}
{{- end -}}

{{/* What whatever opens the database has, the Job too. */}}
{{- define "inference-api.control.databaseMounts" -}}
- {name: tmp, mountPath: /tmp}
{{- if and (not (include "inference-api.control.sqlite" .)) .Values.control.database.caSecret }}
- {name: database-ca, mountPath: /etc/control-plane-database, readOnly: true}
{{- end }}
{{- with .Values.control.extraVolumeMounts }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{- define "inference-api.control.volumes" -}}
{{- $database := .Values.control.database -}}
- name: tmp
  emptyDir: {sizeLimit: 64Mi}
{{- if and (not (include "inference-api.control.sqlite" .)) $database.caSecret }}
- name: database-ca
  projected:
    defaultMode: 288 # 0440
    sources:
      - secret: {name: {{ $database.caSecret | quote }}, items: [{key: {{ $database.caSecretKey | quote }}, path: ca.crt}]}
{{- end }}
{{- with .Values.control.extraVolumes }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{/* What it may connect to: DNS and the database, as the Job, and what else is given; rules of a NetworkPolicy. */}}
{{- define "inference-api.control.egress" -}}
{{- $control := .Values.control -}}
{{ include "inference-api.egressToDns" . }}
{{- with include "inference-api.extraPorts" . | trim }}
{{ . }}
{{- end }}
{{- if eq $control.database.kind "postgresql" }}
# No selector knows its address.
- ports: [{port: {{ int $control.database.port }}, protocol: TCP}]
{{- end }}
{{- with $control.networkPolicy.extraEgress }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{/* The ports of what values tell it to connect to beside these, as JSON {ports}. */}}
{{- define "inference-api.control.ports" -}}
{{- $control := .Values.control -}}
{{- $ports := list -}}
{{- range list $control.oidc.issuer $control.prometheus.url $control.hub.endpoint -}}
{{- with . }}{{ $ports = append $ports (include "inference-api.portOf" . | int) }}{{ end -}}
{{- end -}}
{{- /* What a hub keeps elsewhere is fetched by HTTPS. */}}
{{- if $control.hub.endpoint }}{{ $ports = append $ports 443 }}{{ end -}}
{{- if $control.engines.kubernetes.enabled }}{{ $ports = concat $ports (list 443 6443) }}{{ end -}}
{{- dict "ports" (uniq $ports) | toJson -}}
{{- end -}}

{{/* The hosts that a part is exposed on, as JSON {hosts}; dict ingress, httpRoute. */}}
{{- define "inference-api.exposedHosts" -}}
{{- $hosts := list -}}
{{- if .ingress.enabled }}{{ range .ingress.hosts }}{{ $hosts = append $hosts (lower .host) }}{{ end }}{{ end -}}
{{- if .httpRoute.enabled }}{{ range .httpRoute.hostnames }}{{ $hosts = append $hosts (lower .) }}{{ end }}{{ end -}}
{{- dict "hosts" $hosts | toJson -}}
{{- end -}}

{{/* Of values for the control plane, what does not go together; a line each. */}}
{{- define "inference-api.controlProblems" -}}
{{- if include "inference-api.control" . -}}
{{- $control := .Values.control -}}
{{- $token := $control.serviceToken -}}
{{- if not $token.existingSecret }}
{{ printf "registry.kind is control-plane: name a Secret with the token of the routers in control.serviceToken.existingSecret; to make one: kubectl --namespace %s create secret generic %s-token --from-literal=%s=$(openssl rand -hex 32)" .Release.Namespace (include "inference-api.control.fullname" .) $token.existingSecretKey }}
{{- end -}}
{{- if and (eq $control.database.kind "sqlite") (gt (int $control.replicaCount) 1) }}
{{ printf "control.replicaCount is %d, and a file of SQLite has one owner: set it to 1, or control.database.kind to postgresql" (int $control.replicaCount) }}
{{- end -}}
{{- if and (eq $control.database.kind "postgresql") (not $control.database.existingSecret) }}
{{ print "control.database.kind is postgresql: name the Secret with its URL in control.database.existingSecret" }}
{{- end -}}
{{- if eq (int $control.ports.http) (int $control.ports.api) }}
{{ printf "control.ports.http and control.ports.api are both %d: API and console need a port of their own" (int $control.ports.http) }}
{{- end -}}
{{- if and $control.oidc.issuer (not $control.console.publicUrl) }}
{{ print "control.oidc.issuer is given: set control.console.publicUrl, where it sends people back to" }}
{{- end -}}
{{- if and $control.oidc.issuer (not $control.oidc.clientId) }}
{{ print "control.oidc.issuer is given: set control.oidc.clientId" }}
{{- end -}}
{{- if and (not $control.passwordLogin) (not $control.oidc.issuer) }}
{{ print "control.passwordLogin is false, and nobody could log in: set control.oidc.issuer" }}
{{- end -}}
{{- if ne (empty $control.bootstrap.email) (empty $control.bootstrap.existingSecret) }}
{{ print "control.bootstrap needs both email and existingSecret, or neither: then a link for the first admin is in the log" }}
{{- end -}}
{{- if and $control.bootstrap.email (not $control.passwordLogin) }}
{{ print "control.bootstrap gives the first admin a password, and control.passwordLogin is false: give a group the role admin in control.oidc.roles instead" }}
{{- end -}}
{{- range $control.extraEnv -}}
{{- if eq .name "CONTROL_PLANE_DATABASE_URL" }}
{{ print "control.extraEnv sets CONTROL_PLANE_DATABASE_URL, which control.database is for: name a Secret with it there" }}
{{- end -}}
{{- end -}}
{{- include "inference-api.enginesProblems" . -}}
{{- include "inference-api.consoleProblems" . -}}
{{- end -}}
{{- end -}}

{{/* Of what it may do with engines and models. */}}
{{- define "inference-api.enginesProblems" -}}
{{- $control := .Values.control -}}
{{- $kubernetes := $control.engines.kubernetes -}}
{{- if and (or $kubernetes.scale $kubernetes.logs) (not $kubernetes.enabled) }}
{{ print "control.engines.kubernetes: scale and logs need enabled: true" }}
{{- end -}}
{{- if and $kubernetes.enabled $kubernetes.scale (not (include "inference-api.control.scaled" . | fromJson).names) }}
{{ printf "control.engines.kubernetes.scale is true, and the chart runs no engine in the namespace %s whose pods nobody else counts: name the Deployments that may be scaled in control.engines.kubernetes.deployments" (include "inference-api.control.enginesNamespace" .) }}
{{- end -}}
{{- if and $control.hub.existingSecret (not $control.hub.endpoint) }}
{{ print "control.hub.existingSecret is given: set control.hub.endpoint, whose token it is" }}
{{- end -}}
{{- if and $control.prometheus.existingSecret (not $control.prometheus.url) }}
{{ print "control.prometheus.existingSecret is given: set control.prometheus.url, whose token it is" }}
{{- end -}}
{{- if and $control.triage.engineLogs (not $control.triage.model) }}
{{ print "control.triage.engineLogs is true: set control.triage.model, which would get the lines" }}
{{- end -}}
{{- end -}}

{{/* Of how the console is exposed. */}}
{{- define "inference-api.consoleProblems" -}}
{{- $console := .Values.control.console -}}
{{- $exposed := list -}}
{{- if $console.ingress.enabled }}{{ $exposed = append $exposed "control.console.ingress" }}{{ end -}}
{{- if $console.httpRoute.enabled }}{{ $exposed = append $exposed "control.console.httpRoute" }}{{ end -}}
{{- with $exposed -}}
{{- $places := join " and " . -}}
{{- $hosts := (include "inference-api.exposedHosts" $console | fromJson).hosts -}}
{{- if not $console.enabled }}
{{ printf "%s: control.console.enabled is false, so that no Service has its port: set it to true" $places }}
{{- end -}}
{{- if and $console.ingress.enabled (not $console.ingress.hosts) }}
{{ print "control.console.ingress needs control.console.ingress.hosts" }}
{{- end -}}
{{- if and $console.httpRoute.enabled (not (and $console.httpRoute.parentRefs $console.httpRoute.hostnames)) }}
{{ print "control.console.httpRoute needs parentRefs, the Gateways that it attaches to, and hostnames, which the router must not have" }}
{{- end -}}
{{- if not $console.publicUrl }}
{{ printf "%s: set control.console.publicUrl, the URL that browsers use; cookies and forms depend on it" $places }}
{{- else if and $hosts (not (has (lower (urlParse $console.publicUrl).hostname) $hosts)) }}
{{ printf "control.console.publicUrl (%s) is on none of the hosts of %s (%s)" $console.publicUrl $places (join ", " $hosts) }}
{{- end -}}
{{- if and $.Values.control.networkPolicy.enabled (not $.Values.control.networkPolicy.consoleFrom) }}
{{ printf "%s: nobody could connect; name the namespace of what connects in control.networkPolicy.consoleFrom" $places }}
{{- end -}}
{{- $clients := (include "inference-api.exposedHosts" $.Values.router | fromJson).hosts -}}
{{- range $hosts -}}
{{- if has . $clients }}
{{ printf "%s: %s is the router's host, too, and the console must have one of its own: scripts of one would have the cookies of the other" $places . }}
{{- end -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{/*
`replicas` of a Deployment that an autoscaler scales: nothing, so that the number is the autoscaler's alone, but as long as
giving the field up would remove it, which means one pod. So it is where Helm still owns it, and always where Helm applies on the
client's side: that removes what it no longer says, whoever owns it.
*/}}
{{- define "inference-api.scaledReplicas" -}}
{{- $live := lookup "apps/v1" "Deployment" .Release.Namespace (include "inference-api.fullname" .) -}}
{{- if $live -}}
{{- $applied := dict -}}
{{- range $live.metadata.managedFields -}}
{{- if and (eq .operation "Apply") (dig "f:spec" "f:template" "" .fieldsV1) }}{{ $applied = .fieldsV1 }}{{ end -}}
{{- end -}}
{{- if or (not $applied) (hasKey (get $applied "f:spec") "f:replicas") -}}
replicas: {{ int $live.spec.replicas }}
{{- end -}}
{{- end -}}
{{- end -}}

{{/* Whether the router's pods get a token of their service account. */}}
{{- define "inference-api.automount" -}}
{{- $wanted := .Values.router.serviceAccount.automount -}}
{{- if kindIs "bool" $wanted }}{{ $wanted }}{{ else if include "inference-api.watchesSlices" . }}true{{ else }}false{{ end -}}
{{- end -}}

{{/* The port of a URL, its scheme's where it gives none. */}}
{{- define "inference-api.portOf" -}}
{{- $url := urlParse . -}}
{{- regexFind ":[0-9]+$" $url.host | trimPrefix ":" | default (eq $url.scheme "https" | ternary "443" "80") -}}
{{- end -}}

{{/*
The ports of what values tell the router to connect to, as JSON {ports}, but for the pods of the chart itself, which have
labels to select them by: a NetworkPolicy knows no host names.
*/}}
{{- define "inference-api.egressPorts" -}}
{{- $root := . -}}
{{- $urls := list -}}
{{- if not .Values.registry.enabled }}{{ with .Values.router.registry.url }}{{ $urls = append $urls . }}{{ end }}{{ end -}}
{{- with .Values.monitoring.otel }}{{ if .enabled }}{{ $urls = append $urls .endpoint }}{{ end }}{{ end -}}
{{- $deployed := include "inference-api.deployed" . | fromJson -}}
{{- range (include "inference-api.catalogue" . | fromYaml).models -}}
{{- if not (hasKey $deployed .name) }}{{ range .backends }}{{ $urls = append $urls .url }}{{ end }}{{ end -}}
{{- end -}}
{{- $ports := list -}}
{{- range $urls }}{{ $ports = append $ports (include "inference-api.portOf" . | int) }}{{ end -}}
{{- if eq .Values.router.rateLimits.store "redis" }}{{ $ports = append $ports (int .Values.router.rateLimits.redis.port) }}{{ end -}}
{{- if include "inference-api.watchesSlices" . }}{{ $ports = concat $ports (list 443 6443) }}{{ end -}}
{{- dict "ports" (uniq $ports) | toJson -}}
{{- end -}}

{{/* The router's environment, as a list. INFERENCE_API_* are exactly the app's settings; tests/k8s holds them to it. */}}
{{- define "inference-api.routerEnv" -}}
{{- $router := .Values.router -}}
{{- $settings := dict
  "HOST" $router.host
  "PORT" $router.ports.http
  "OPS_PORT" $router.ports.ops
  "CATALOGUE" "/etc/inference-api/catalogue.yaml"
  "LOG_LEVEL" $router.logLevel
  "LOG_FORMAT" "json"
  "CONNECT_TIMEOUT" $router.timeouts.connect
  "FIRST_BYTE_TIMEOUT" $router.timeouts.firstByte
  "IDLE_TIMEOUT" $router.timeouts.idle
  "TOTAL_TIMEOUT" $router.timeouts.total
  "STREAM_TIMEOUT" $router.timeouts.stream
  "DRAIN_DELAY" $router.drain.delaySeconds
  "DRAIN_TIMEOUT" $router.drain.timeoutSeconds
  "MAX_IN_FLIGHT" $router.limits.maxInFlight
  "MAX_BODY_BYTES" $router.limits.maxBodyBytes
  "MAX_BUFFERED_BYTES" $router.limits.maxBufferedBytes
  "DISCOVERY_INTERVAL" $router.discovery.intervalSeconds
  "REGISTRY_REFRESH" $router.registry.refreshSeconds
-}}
{{- with include "inference-api.registryUrl" . }}{{ $_ := set $settings "REGISTRY_URL" . }}{{ end -}}
{{- if $router.registry.required }}{{ $_ := set $settings "REGISTRY_REQUIRED" "on" }}{{ end -}}
{{- if include "inference-api.watchesSlices" . }}{{ $_ := set $settings "DISCOVERY" $router.discovery.mode }}{{ end -}}
{{- if or (include "inference-api.control" .) (include "inference-api.policyFromRegistry" .) }}{{ $_ := set $settings "REPORT_INTERVAL" 5 }}{{ end -}}
{{- range $name, $value := include "inference-api.policySettings" . | fromJson }}{{ $_ := set $settings $name $value }}{{ end -}}
{{- range $name, $value := $router.settings }}{{ $_ := set $settings $name $value }}{{ end -}}
{{- range $name, $value := $settings }}
- name: INFERENCE_API_{{ $name }}
  value: {{ include "inference-api.scalar" $value | quote }}
{{- end }}
{{- $token := $router.registry -}}
{{- if and (include "inference-api.control" .) (not $token.existingSecret) }}{{ $token = .Values.control.serviceToken }}{{ end -}}
{{- $secrets := dict "REGISTRY_TOKEN" $token "KEY_PEPPER" $router.auth.pepper -}}
{{- if eq $router.rateLimits.store "redis" }}{{ $_ := set $secrets "REDIS_URL" $router.rateLimits.redis }}{{ end -}}
{{- range $name, $source := $secrets }}
{{- if $source.existingSecret }}
- name: INFERENCE_API_{{ $name }}
  valueFrom: {secretKeyRef: {name: {{ $source.existingSecret | quote }}, key: {{ $source.existingSecretKey | quote }}}}
{{- end }}
{{- end }}
{{- if $router.registry.caSecret }}
- name: SSL_CERT_FILE
  value: /etc/inference-api-ca/ca.crt
{{- end }}
{{- range $name, $source := $router.backendTokens }}
- name: {{ $name }}
  valueFrom: {secretKeyRef: {name: {{ $source.secret | quote }}, key: {{ $source.key | quote }}}}
{{- end }}
{{- with .Values.monitoring.otel }}
{{- if .enabled }}
- name: K8S_POD_NAME
  valueFrom: {fieldRef: {fieldPath: metadata.name}}
- name: K8S_NODE_NAME
  valueFrom: {fieldRef: {fieldPath: spec.nodeName}}
- name: OTEL_SERVICE_NAME
  value: {{ include "inference-api.fullname" $ }}
- name: OTEL_EXPORTER_OTLP_ENDPOINT
  value: {{ .endpoint | quote }}
- name: OTEL_EXPORTER_OTLP_PROTOCOL
  value: http/protobuf
- name: OTEL_TRACES_SAMPLER
  value: {{ .sampler | quote }}
- name: OTEL_TRACES_SAMPLER_ARG
  value: {{ .samplerArg | quote }}
- name: OTEL_RESOURCE_ATTRIBUTES
  value: k8s.namespace.name={{ $.Release.Namespace }},k8s.pod.name=$(K8S_POD_NAME),k8s.node.name=$(K8S_NODE_NAME)
    {{- with $.Values.clusterName }},k8s.cluster.name={{ . }}{{ end }}
{{- end }}
{{- end }}
{{- with $router.extraEnv }}
{{ toYaml . }}
{{- end }}
{{- end -}}

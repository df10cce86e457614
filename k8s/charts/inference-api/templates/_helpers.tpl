{{/* Names: the router has the release's own, so that clients say http://inference-api/v1. */}}
{{- define "inference-api.name" -}}
{{- default .Chart.Name .Values.nameOverride | trunc 63 | trimSuffix "-" -}}
{{- end -}}

{{/* Cut at 43: with what is added to it, it is also the name of pods and a label, and these have 63 characters at most. */}}
{{- define "inference-api.fullname" -}}
{{- if .Values.fullnameOverride -}}
{{- .Values.fullnameOverride | trunc 43 | trimSuffix "-" -}}
{{- else if contains (include "inference-api.name" .) .Release.Name -}}
{{- .Release.Name | trunc 43 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-%s" .Release.Name (include "inference-api.name" .) | trunc 43 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}

{{- define "inference-api.registry.fullname" -}}
{{- printf "%s-registry" (include "inference-api.fullname" .) -}}
{{- end -}}

{{/*
Labels; dict root, component. Selectors are immutable, so of all values only nameOverride is in them: it is for a first
install, and an upgrade that changes it fails. commonLabels come later, and the schema keeps these names out of them.
*/}}
{{- define "inference-api.selectorLabels" -}}
app.kubernetes.io/name: {{ include "inference-api.name" .root | quote }}
app.kubernetes.io/instance: {{ .root.Release.Name | quote }}
app.kubernetes.io/component: {{ .component }}
{{- end -}}

{{- define "inference-api.labels" -}}
helm.sh/chart: {{ printf "%s-%s" .root.Chart.Name .root.Chart.Version | replace "+" "_" | trunc 63 | trimSuffix "-" }}
{{ include "inference-api.selectorLabels" . }}
app.kubernetes.io/version: {{ .root.Values.image.tag | default .root.Chart.AppVersion | trunc 63 | quote }}
app.kubernetes.io/managed-by: {{ .root.Release.Service }}
app.kubernetes.io/part-of: inference-api
{{- with .root.Values.commonLabels }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{/* Of pods: without the chart's version, so that a new chart restarts only what it changes. An engine takes its time. */}}
{{- define "inference-api.podLabels" -}}
{{ include "inference-api.selectorLabels" . }}
app.kubernetes.io/part-of: inference-api
{{- with .root.Values.commonLabels }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{/* An annotation of pods that must be restarted when the catalogue changes. Routers need not: they read it again. */}}
{{- define "inference-api.checksum" -}}
checksum/catalogue: {{ include "inference-api.catalogue" . | sha256sum }}
{{- end -}}

{{/* An image reference; dict root, image {registry, repository, tag, digest}, tag (where the image has none). */}}
{{- define "inference-api.imageOf" -}}
{{- $registry := .root.Values.global.imageRegistry | default .image.registry -}}
{{- $tag := .image.tag | default .tag -}}
{{- with $registry }}{{ . }}/{{ end -}}
{{- .image.repository -}}
{{- with $tag }}:{{ . }}{{ end -}}
{{- with .image.digest }}@{{ . }}{{ end -}}
{{- end -}}

{{- define "inference-api.image" -}}
{{- include "inference-api.imageOf" (dict "root" . "image" .Values.image "tag" .Chart.AppVersion) -}}
{{- end -}}

{{- define "inference-api.imagePullSecrets" -}}
{{- with .Values.global.imagePullSecrets }}
imagePullSecrets:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end -}}

{{- define "inference-api.serviceAccountName" -}}
{{- if .Values.router.serviceAccount.create -}}
{{- .Values.router.serviceAccount.name | default (include "inference-api.fullname" .) -}}
{{- else -}}
{{- .Values.router.serviceAccount.name | default "default" -}}
{{- end -}}
{{- end -}}

{{/* The one place that knows what the app calls it: not empty when the router watches EndpointSlices. */}}
{{- define "inference-api.watchesSlices" -}}
{{- if eq .Values.router.discovery.mode "endpointslices" }}true{{ end -}}
{{- end -}}

{{/* A quantity in bytes, say of 512Mi. */}}
{{- define "inference-api.bytes" -}}
{{- $units := dict "k" 1000 "M" 1000000 "G" 1000000000 "T" 1000000000000 "Ki" 1024 "Mi" 1048576 "Gi" 1073741824 "Ti" 1099511627776 -}}
{{- $text := include "inference-api.scalar" . -}}
{{- $unit := regexFind "[A-Za-z]*$" $text -}}
{{- mulf (trimSuffix $unit $text | float64) (get $units $unit | default 1 | float64) | int64 -}}
{{- end -}}

{{/* What a container needs, with room on the node's disk for its emptyDirs; dict resources, disk. */}}
{{- define "inference-api.resources" -}}
{{- $resources := deepCopy .resources -}}
{{- $requests := merge (dict) ($resources.requests | default dict) (dict "ephemeral-storage" .disk) -}}
{{- $_ := set $resources "requests" $requests -}}
{{- toYaml $resources -}}
{{- end -}}

{{/*
A list of environment variables with each name once, the last one of it: by server-side apply the API server refuses two, and
elsewhere the last one counts.
*/}}
{{- define "inference-api.variables" -}}
{{- $seen := dict -}}
{{- $kept := list -}}
{{- range reverse . -}}
{{- if not (hasKey $seen .name) -}}
{{- $_ := set $seen .name true -}}
{{- $kept = prepend $kept . -}}
{{- end -}}
{{- end -}}
{{- toYaml $kept -}}
{{- end -}}

{{/* DNS, which is elsewhere in every cluster: in kube-system, on the node, in OpenShift on a port of its own. */}}
{{- define "inference-api.egressToDns" -}}
- ports: [{port: 53, protocol: UDP}, {port: 53, protocol: TCP}, {port: 5353, protocol: UDP}, {port: 5353, protocol: TCP}]
{{- end -}}

{{/* Rules of a NetworkPolicy for the ports of a mesh, which takes all connections there, in and out; empty: none. */}}
{{- define "inference-api.extraPorts" -}}
{{- with .Values.networkPolicy.extraPorts }}
- ports:
    {{- range . }}
    - {port: {{ int . }}, protocol: TCP}
    {{- end }}
{{- end }}
{{- end -}}

{{/* A number as people write it: Helm reads 33554432 as 3.3554432e+07. */}}
{{- define "inference-api.scalar" -}}
{{- if kindIs "float64" . -}}
{{- if eq . (floor .) }}{{ int64 . }}{{ else }}{{ . }}{{ end -}}
{{- else if kindIs "slice" . -}}
{{- $parts := list -}}
{{- range . }}{{ $parts = append $parts (include "inference-api.scalar" .) }}{{ end -}}
{{- join "," $parts -}}
{{- else -}}
{{- . -}}
{{- end -}}
{{- end -}}

{{/* Where the router finds the registry; empty: nowhere. */}}
{{- define "inference-api.registryUrl" -}}
{{- if include "inference-api.control" . -}}
{{- printf "http://%s:%d" (include "inference-api.control.fullname" .) (int .Values.control.ports.http) -}}
{{- else if .Values.registry.enabled -}}
{{- printf "http://%s:%d" (include "inference-api.registry.fullname" .) (int .Values.registry.service.port) -}}
{{- else -}}
{{- .Values.router.registry.url -}}
{{- end -}}
{{- end -}}

{{/* The longest that a request may take, in seconds; what the drain and proxies in front must allow. */}}
{{- define "inference-api.longestRequest" -}}
{{- $longest := max (ceil .Values.router.timeouts.stream | int) (ceil .Values.router.timeouts.total | int) -}}
{{- range .Values.models }}
{{- with .timeouts }}{{ with .total }}{{ $longest = max $longest (ceil . | int) }}{{ end }}{{ end -}}
{{- end -}}
{{- $longest -}}
{{- end -}}

{{/* Accept for a while, finish streams, say goodbye to the rest: what the kubelet must wait before it kills. */}}
{{- define "inference-api.gracePeriod" -}}
{{- add (ceil .delaySeconds | int) (ceil .timeoutSeconds | int) (int .reserveSeconds) -}}
{{- end -}}

{{/* A model's name as the name of a Service: lower case letters, digits and dashes. */}}
{{- define "inference-api.slug" -}}
{{- regexReplaceAll "[^a-z0-9]+" (lower .) "-" | trunc 57 | trimAll "-" -}}
{{- end -}}

{{/* The catalogue: what values say under `models`, in the shape that the app and the registry read. */}}
{{- define "inference-api.catalogue" -}}
{{- $entries := list -}}
{{- $root := . -}}
{{- range $name, $model := .Values.models -}}
{{- $entry := merge (dict "name" $name) (omit $model "deploy") -}}
{{- if not (or $entry.backends $entry.split $entry.race $entry.consensus) -}}
{{- $host := printf "%s.%s.svc" (include "inference-api.slug" $name) $root.Release.Namespace -}}
{{- $url := printf "http://%s:%d" $host (int $root.Values.engines.port) -}}
{{- $_ := set $entry "backends" (list (dict "url" $url "discovery" "dns")) -}}
{{- end -}}
{{- $entries = append $entries $entry -}}
{{- end -}}
{{- toYaml (dict "models" $entries) -}}
{{- end -}}

{{/* The models whose engines the chart runs, as JSON {name: model}. */}}
{{- define "inference-api.deployed" -}}
{{- $deployed := dict -}}
{{- if .Values.engines.enabled -}}
{{- range $name, $model := .Values.models -}}
{{- with $model.deploy -}}
{{- if and (dig "enabled" true .) (has ($model.engine | default "vllm") (list "vllm" "tgi")) }}{{ $_ := set $deployed $name $model }}{{ end -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- toJson $deployed -}}
{{- end -}}

{{/* Even over zones and nodes, each rollout for itself; dict root, component. */}}
{{- define "inference-api.topologySpread" -}}
{{- range list "topology.kubernetes.io/zone" "kubernetes.io/hostname" }}
- maxSkew: 1
  topologyKey: {{ . }}
  whenUnsatisfiable: {{ $.root.Values.router.topologySpread.whenUnsatisfiable }}
  labelSelector:
    matchLabels:
      {{- include "inference-api.selectorLabels" $ | nindent 6 }}
  matchLabelKeys: [pod-template-hash]
{{- end }}
{{- end -}}

{{/* Where to schedule; dict of one component's values. */}}
{{- define "inference-api.placement" -}}
{{- range $key := list "nodeSelector" "tolerations" "affinity" }}
{{- with index $ $key }}
{{ $key }}:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end }}
{{- with .priorityClassName }}
priorityClassName: {{ . | quote }}
{{- end }}
{{- end -}}

{{/* What is wrong with models, a line each. First with the engines that the chart runs for them. */}}
{{- define "inference-api.modelProblems" -}}
{{- $slugs := dict -}}
{{- $cache := .Values.engines.cache -}}
{{- range $name, $model := include "inference-api.deployed" . | fromJson -}}
{{- $slug := include "inference-api.slug" $name -}}
{{- with get $slugs $slug }}
{{ printf "models.%s and models.%s would have the same Service, %s; rename one" . $name $slug }}
{{- end -}}
{{- $_ := set $slugs $slug $name -}}
{{- $asked := not $model.backends -}}
{{- range $model.backends }}{{ if hasPrefix (printf "%s.%s.svc" $slug $.Release.Namespace) (urlParse .url).hostname }}{{ $asked = true }}{{ end }}{{ end -}}
{{- if not $asked }}
{{ printf "models.%s has deploy, and backends that do not lead to it, so nobody would ask the engine that the chart runs: take one of them away, or add http://%s.%s.svc:%d to the backends" $name $slug $.Release.Namespace (int $.Values.engines.port) }}
{{- end -}}
{{- if not (regexMatch "^[a-z]" $slug) }}
{{ printf "models.%s.deploy: its Service would be named %q, and such names begin with a letter; rename the model, and make this name an alias" $name $slug }}
{{- end -}}
{{- $place := "replicas" -}}
{{- $pods := int $model.deploy.replicas -}}
{{- with $model.deploy.keda }}{{ $place = "keda.maxReplicas" }}{{ $pods = int .maxReplicas }}{{ end -}}
{{- if and $cache.enabled (gt $pods 1) (not (has "ReadWriteMany" $cache.accessModes)) (not $model.deploy.existingClaim) }}
{{ printf "models.%s.deploy.%s is %d, and a cache that is %s is on one node: set engines.cache.accessModes to [ReadWriteMany], for a claim that is there already name another one in models.%s.deploy.existingClaim, or set engines.cache.enabled to false" $name $place $pods (first $cache.accessModes) $name }}
{{- end -}}
{{- with $model.deploy.keda -}}
{{- if not $.Values.engines.keda.serverAddress }}
{{ printf "models.%s.deploy.keda needs engines.keda.serverAddress, the URL of Prometheus" $name }}
{{- end -}}
{{- if not (kindIs "invalid" $model.deploy.replicas) }}
{{ printf "models.%s.deploy.keda and models.%s.deploy.replicas exclude each other: set replicas to null" $name $name }}
{{- end -}}
{{- if and (not .minReplicas) (not $model.hold) }}
{{ printf "models.%s.deploy.keda scales it to zero, where requests would be refused: set models.%s.hold to the seconds that they may wait for its start, or minReplicas to 1" $name $name }}
{{- end -}}
{{- if gt (int .minReplicas) (int .maxReplicas) }}
{{ printf "models.%s.deploy.keda.minReplicas (%d) is more than its maxReplicas (%d)" $name (int .minReplicas) (int .maxReplicas) }}
{{- end -}}
{{- end -}}
{{- end -}}
{{- $fullname := include "inference-api.fullname" . -}}
{{- $own := list $fullname (printf "%s-ops" $fullname) (include "inference-api.registry.fullname" .) -}}
{{- if include "inference-api.control" . }}{{ $own = append $own (include "inference-api.control.fullname" .) }}{{ end -}}
{{- range $name, $model := .Values.models -}}
{{- if and (not $model.backends) (has (include "inference-api.slug" $name) $own) }}
{{ printf "models.%s: its Service would be named %s, as one of the release itself; rename the model, or set fullnameOverride" $name (include "inference-api.slug" $name) }}
{{- end -}}
{{- $engine := $model.engine | default "vllm" -}}
{{- if and $.Values.engines.enabled (dig "enabled" true ($model.deploy | default (dict "enabled" false))) (not (has $engine (list "vllm" "tgi"))) }}
{{ printf "models.%s.deploy: the chart runs vllm and tgi, not the engine %s; set deploy to null, and give backends" $name $engine }}
{{- end -}}
{{- end -}}
{{- end -}}

{{/* What the router would refuse in its catalogue, at its start: a pod that is restarted then would not come back. */}}
{{- define "inference-api.catalogueProblems" -}}
{{- $tokens := keys .Values.router.backendTokens -}}
{{- range .Values.router.extraEnv }}{{ $tokens = append $tokens .name }}{{ end -}}
{{- $owners := dict -}}
{{- range $name, $model := .Values.models -}}
{{- range prepend ($model.aliases | default list) $name | uniq -}}
{{- if hasKey $owners . }}
{{ printf "models.%s and models.%s share the name %s, which can be that of one model only: change the name, or the aliases" (get $owners .) $name . }}
{{- else }}{{ $_ := set $owners . $name }}{{ end -}}
{{- end -}}
{{- if and $model.queue (not $model.max_in_flight) }}
{{ printf "models.%s.queue needs models.%s.max_in_flight: at that many requests others wait" $name $name }}
{{- end -}}
{{- $urls := list -}}
{{- range $model.backends -}}
{{- $url := .url | trimSuffix "/" -}}
{{- if has $url $urls }}
{{ printf "models.%s lists the backend %s twice: give it once, with a weight" $name $url }}
{{- end -}}
{{- $urls = append $urls $url -}}
{{- include "inference-api.backendProblems" (dict "name" $name "backend" .) -}}
{{- end -}}
{{- if kindIs "map" $model.credentials -}}
{{- $variable := $model.credentials.env | default "" -}}
{{- if and $variable (not (has $variable $tokens)) (not $.Values.router.extraEnvFrom) }}
{{ printf "models.%s.credentials.env is %s, which no pod would have: add it to router.backendTokens, with its Secret" $name $variable }}
{{- end -}}
{{- $file := $model.credentials.file | default "" -}}
{{- if and (hasPrefix "/etc/inference-api-tokens/" $file) (not (hasKey $.Values.router.backendTokens (base $file))) }}
{{ printf "models.%s.credentials.file is %s, which no pod would have: add %s to router.backendTokens, with its Secret" $name $file (base $file) }}
{{- end -}}
{{- end -}}
{{- end -}}
{{- $size := include "inference-api.catalogue" . | len -}}
{{- if gt $size 1000000 }}
{{ printf "models are %d bytes as a catalogue, and a ConfigMap holds 1 MiB: keep them in a registry, and set router.registry.url" $size }}
{{- end -}}
{{- end -}}

{{/* Addresses that a catalogue may not aim the router at, and look-ups of what needs none; dict name, backend. */}}
{{- define "inference-api.backendProblems" -}}
{{- $host := (urlParse .backend.url).hostname | lower -}}
{{- $metadata := list "metadata" "metadata.google.internal" "metadata.goog" "instance-data" "instance-data.ec2.internal" "100.100.100.200" "168.63.129.16" "192.0.0.192" -}}
{{- $address := or (contains ":" $host) (regexMatch "^[0-9.]+$" $host) -}}
{{- if or (has (trimSuffix "." $host) $metadata) (regexMatch "^(169\\.254|0|22[4-9]|23[0-9]|25[0-5])\\.|^0x|^[0-9]+$|^(fe[89ab]|ff)[0-9a-f]{0,2}:|^fd00:ec2::254$|^fd20:ce::254$" $host) }}
{{ printf "models.%s: the backend %s is a link-local, metadata or unusable address, which the router refuses" .name .backend.url }}
{{- end -}}
{{- if and (eq (.backend.discovery | default "static") "dns") $address }}
{{ printf "models.%s: the backend %s has discovery dns, which needs a host name, and this is an address: leave discovery away" .name .backend.url }}
{{- end -}}
{{- end -}}

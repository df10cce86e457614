{{/* Labels of one model's engine; dict root, slug. */}}
{{- define "inference-api.engineSelectorLabels" -}}
{{ include "inference-api.selectorLabels" (dict "root" .root "component" "engine") }}
inference-api/service: {{ .slug }}
{{- end -}}

{{- define "inference-api.engineLabels" -}}
{{ include "inference-api.labels" (dict "root" .root "component" "engine") }}
inference-api/service: {{ .slug }}
{{- end -}}

{{/* What each engine is started with; dict name, model, engines, host. */}}
{{- define "inference-api.vllmCommand" -}}
{{- $gpus := int (.model.deploy.gpus | default 1) -}}
command: [vllm, serve]
args:
  - {{ required (printf "models.%s.deploy.model: what the engine loads" .name) .model.deploy.model | quote }}
  - {{ printf "--host=%s" .host | quote }}
  - --port={{ int .engines.port }}
  - {{ printf "--served-model-name=%s" (.model.served_model_name | default .name) | quote }}
  - --download-dir=/cache/huggingface/hub
  - --shutdown-timeout={{ int .engines.drain.timeoutSeconds }}
  {{- if gt $gpus 1 }}
  - --tensor-parallel-size={{ $gpus }}
  {{- end }}
  {{- range .model.deploy.args }}
  - {{ . | quote }}
  {{- end }}
{{- end -}}

{{- define "inference-api.tgiCommand" -}}
{{- $gpus := int (.model.deploy.gpus | default 1) -}}
command: [text-generation-launcher]
args:
  - {{ required (printf "models.%s.deploy.model: what the engine loads" .name) .model.deploy.model | printf "--model-id=%s" | quote }}
  - {{ printf "--hostname=%s" .host | quote }}
  - --port={{ int .engines.port }}
  - --huggingface-hub-cache=/cache/huggingface/hub
  {{- if gt $gpus 1 }}
  - --num-shard={{ $gpus }}
  {{- end }}
  {{- range .model.deploy.args }}
  - {{ . | quote }}
  {{- end }}
{{- end -}}

{{/* A GPU is a limit and a request at once; dict engines, deploy. */}}
{{- define "inference-api.engineResources" -}}
{{- $resources := deepCopy (.deploy.resources | default .engines.resources) -}}
{{- $gpus := kindIs "invalid" .deploy.gpus | ternary 1 .deploy.gpus | int -}}
{{- range $kind := list "requests" "limits" -}}
{{- $of := get $resources $kind | default dict -}}
{{- if $gpus }}{{ $_ := set $of $.engines.gpuResource $gpus }}{{ end -}}
{{- $_ := set $resources $kind $of -}}
{{- end -}}
{{- toYaml $resources -}}
{{- end -}}

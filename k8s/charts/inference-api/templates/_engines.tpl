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
{{- $cache := and (not .engines.cache.enabled) (not .deploy.existingClaim) | ternary (.deploy.cacheSize | default "50Gi") "0" -}}
{{- $disk := add (include "inference-api.bytes" $cache | int64) (include "inference-api.bytes" .engines.tmpSizeLimit | int64) -}}
{{- $resources := include "inference-api.resources" (dict "resources" (.deploy.resources | default .engines.resources) "disk" (printf "%dMi" (div $disk 1048576))) | fromYaml -}}
{{- $gpus := kindIs "invalid" .deploy.gpus | ternary 1 .deploy.gpus | int -}}
{{- range $kind := list "requests" "limits" -}}
{{- $of := get $resources $kind | default dict -}}
{{- if $gpus }}{{ $_ := set $of $.engines.gpuResource $gpus }}{{ end -}}
{{- $_ := set $resources $kind $of -}}
{{- end -}}
{{- toYaml $resources -}}
{{- end -}}

{{/* The variables of an engine; dict engines, deploy. */}}
{{- define "inference-api.engineEnv" -}}
# The user has no home and no name in the image; what is compiled or downloaded goes where one can write.
- {name: HOME, value: /tmp}
- {name: USER, value: engine}
- {name: LOGNAME, value: engine}
- {name: HF_HOME, value: /cache/huggingface}
- {name: HUGGINGFACE_HUB_CACHE, value: /cache/huggingface/hub}
- {name: XDG_CACHE_HOME, value: /cache}
- {name: VLLM_CACHE_ROOT, value: /cache/vllm}
- {name: TRITON_CACHE_DIR, value: /tmp/triton}
- {name: TORCHINDUCTOR_CACHE_DIR, value: /tmp/inductor}
{{- with .engines.huggingFace }}
{{- if .existingSecret }}
- name: HF_TOKEN
  valueFrom: {secretKeyRef: {name: {{ .existingSecret | quote }}, key: {{ .existingSecretKey | quote }}}}
{{- end }}
{{- end }}
{{- with concat .engines.extraEnv (default list .deploy.env) }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{/*
Claims. But for its size a claim is for ever, so what cannot be changed is told before the API server refuses half of an
upgrade. That needs the claim as it is, which `lookup` finds in a cluster; `helm template`, and so Argo CD, finds nothing.
*/}}

{{/* Not empty: the registry has a volume. What nobody can change need not be kept. */}}
{{- define "inference-api.registryKeeps" -}}
{{- with .Values.registry -}}
{{- if and (include "inference-api.stub" $) .persistence.enabled (or .auth.existingSecret .persistence.existingClaim) }}true{{ end -}}
{{- end -}}
{{- end -}}

{{- define "inference-api.registryClaim" -}}
{{- .Values.registry.persistence.existingClaim | default (include "inference-api.registry.fullname" .) -}}
{{- end -}}

{{/* Of a claim {accessModes, storageClassName, annotations}: which class values asked for, which the claim itself may not tell. */}}
{{- define "inference-api.claimAnnotations" -}}
inference-api/storage-class: {{ .storageClassName | quote }}
{{- with .annotations }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{/* dict claim, size. */}}
{{- define "inference-api.claimSpec" -}}
accessModes:
  {{- toYaml .claim.accessModes | nindent 2 }}
{{- with .claim.storageClassName }}
storageClassName: {{ . | quote }}
{{- end }}
resources:
  requests: {storage: {{ .size }}}
{{- end -}}

{{/* What cannot be changed of a claim that is there, a line each; dict root, name, claim, size, place, instead. */}}
{{- define "inference-api.claimProblems" -}}
{{- $live := lookup "v1" "PersistentVolumeClaim" .root.Release.Namespace .name -}}
{{- if $live -}}
{{- $said := get ($live.metadata.annotations | default dict) "inference-api/storage-class" | default $live.spec.storageClassName -}}
{{- $size := $live.spec.resources.requests.storage -}}
{{- $instead := printf "the claim %s is there, and a claim cannot be changed so: take it back, or make another claim, copy what is needed, and name it in %s" .name .instead -}}
{{- if and .claim.storageClassName (ne .claim.storageClassName $said) }}
{{ printf "%s.storageClassName (%s) is not that of the volume (%s): %s" .place .claim.storageClassName $said $instead }}
{{- end -}}
{{- if and (not .claim.storageClassName) (get ($live.metadata.annotations | default dict) "inference-api/storage-class") }}
{{ printf "%s.storageClassName is empty, and was %s: %s" .place $said $instead }}
{{- end -}}
{{- if ne (join "," .claim.accessModes) (join "," $live.spec.accessModes) }}
{{ printf "%s.accessModes (%s) are not those of the volume (%s): %s" .place (join ", " .claim.accessModes) (join ", " $live.spec.accessModes) $instead }}
{{- end -}}
{{- if lt (include "inference-api.bytes" .size | int64) (include "inference-api.bytes" $size | int64) }}
{{ printf "%s (%v) is less than the volume has (%v): %s" .sizePlace .size $size $instead }}
{{- end -}}
{{- end -}}
{{- end -}}

{{/* The cluster's name on every series, then what the scrape needs, then the user's; dict root, own, more. */}}
{{- define "inference-api.relabelings" -}}
{{- $all := .own -}}
{{- with .root.Values.clusterName }}{{ $all = prepend $all (dict "targetLabel" "cluster" "replacement" .) }}{{ end -}}
{{- with concat $all .more -}}
relabelings:
  {{- toYaml . | nindent 2 }}
{{- end -}}
{{- end -}}

{{/*
The groups of a file of rules, as JSON {groups}, without the alerts that are not wanted; dict root, path. Read, not rendered: the
annotations are Prometheus' templates. A link to the runbook is one only where the repository is known. Rules of the control plane are
for where the chart runs it: elsewhere its absence would be an alert.
*/}}
{{- define "inference-api.ruleGroups" -}}
{{- $values := .root.Values.monitoring.prometheusRule -}}
{{- $groups := list -}}
{{- $wanted := or (ne (base .path) "control-plane.yaml") (include "inference-api.control" .root) -}}
{{- range ternary (.root.Files.Get .path | fromYaml).groups list (not (empty $wanted)) -}}
{{- $rules := list -}}
{{- range .rules -}}
{{- with .annotations -}}
{{- if and .runbook_url (hasPrefix "k8s/" .runbook_url) -}}
{{- $place := .runbook_url -}}
{{- $_ := unset . "runbook_url" -}}
{{- if $values.repositoryUrl }}{{ $_ := set . "runbook_url" (printf "%s/%s" (trimSuffix "/" $values.repositoryUrl) $place) }}{{ else }}{{ $_ := set . "runbook" $place }}{{ end -}}
{{- end -}}
{{- end -}}
{{- if not (has (.alert | default "") $values.disabled) }}{{ $rules = append $rules . }}{{ end -}}
{{- end -}}
{{- if $rules }}{{ $groups = append $groups (set (deepCopy .) "rules" $rules) }}{{ end -}}
{{- end -}}
{{- dict "groups" $groups | toJson -}}
{{- end -}}

{{/* Labels of the series of this release's routers, for an autoscaler. `service` tells two releases in one namespace apart, and
`cluster` two clusters in one Prometheus: the chart's ServiceMonitor sets both. */}}
{{- define "inference-api.ownSeries" -}}
namespace={{ .Release.Namespace | quote }}
{{- if .Values.monitoring.serviceMonitor.enabled }}, service="{{ include "inference-api.fullname" . }}-ops"
{{- with .Values.clusterName }}, cluster={{ . | quote }}{{ end }}
{{- end }}
{{- end -}}

{{/* The cluster's name on every series, then what the scrape needs, then the user's; dict root, own, more. */}}
{{- define "inference-api.relabelings" -}}
{{- $all := .own -}}
{{- with .root.Values.clusterName }}{{ $all = prepend $all (dict "targetLabel" "cluster" "replacement" .) }}{{ end -}}
{{- with concat $all .more -}}
relabelings:
  {{- toYaml . | nindent 2 }}
{{- end -}}
{{- end -}}

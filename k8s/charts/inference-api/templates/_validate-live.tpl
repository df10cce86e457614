{{/*
What does not go together with what is in the cluster, a line each: told before anything is changed, where `lookup` can look.
`helm template` and Argo CD cannot; there the API server or Helm itself says it, later and in their words.
*/}}
{{- define "inference-api.liveProblems" -}}
{{- $claim := .Values.registry.persistence -}}
{{- if and (include "inference-api.registryKeeps" .) (not $claim.existingClaim) }}
{{ include "inference-api.claimProblems" (dict "root" . "name" (include "inference-api.registryClaim" .) "claim" $claim "size" $claim.size "place" "registry.persistence" "sizePlace" "registry.persistence.size" "instead" "registry.persistence.existingClaim") }}
{{- end -}}
{{- $spool := .Values.router.usage.spool.persistence -}}
{{- if and (include "inference-api.spoolClaim" .) (not $spool.existingClaim) }}
{{ include "inference-api.claimProblems" (dict "root" . "name" (include "inference-api.spoolClaim" .) "claim" $spool "size" $spool.size "place" "router.usage.spool.persistence" "sizePlace" "router.usage.spool.persistence.size" "instead" "router.usage.spool.persistence.existingClaim") }}
{{- end -}}
{{- $data := .Values.control.database.persistence -}}
{{- if and (include "inference-api.control.claim" .) (not $data.existingClaim) }}
{{ include "inference-api.claimProblems" (dict "root" . "name" (include "inference-api.control.claim" .) "claim" $data "size" $data.size "place" "control.database.persistence" "sizePlace" "control.database.persistence.size" "instead" "control.database.persistence.existingClaim") }}
{{- end -}}
{{- $cache := .Values.engines.cache -}}
{{- range $name, $model := include "inference-api.deployed" . | fromJson -}}
{{- $slug := include "inference-api.slug" $name -}}
{{- if and $cache.enabled (not $model.deploy.existingClaim) }}
{{ include "inference-api.claimProblems" (dict "root" $ "name" (printf "%s-cache" $slug) "claim" $cache "size" ($model.deploy.cacheSize | default "50Gi") "place" "engines.cache" "sizePlace" (printf "models.%s.deploy.cacheSize" $name) "instead" (printf "models.%s.deploy.existingClaim" $name)) }}
{{- end -}}
{{- with lookup "v1" "Service" $.Release.Namespace $slug -}}
{{- $owner := get (.metadata.annotations | default dict) "meta.helm.sh/release-name" | default "none" -}}
{{- if ne $owner $.Release.Name }}
{{ printf "models.%s.deploy: the Service %s is there already, of the release %s: give backends instead of deploy, to share its engine, or install into a namespace of its own" $name $slug $owner }}
{{- end -}}
{{- end -}}
{{- end -}}
{{- if .Release.IsUpgrade -}}
{{- $fullname := include "inference-api.fullname" . -}}
{{- range get (lookup "apps/v1" "Deployment" .Release.Namespace "") "items" -}}
{{- $labels := .metadata.labels | default dict -}}
{{- $chart := regexMatch (printf "^%s-[0-9]" $.Chart.Name) (get $labels "helm.sh/chart" | default "") -}}
{{- $ours := and $chart (eq (get $labels "app.kubernetes.io/instance" | default "") $.Release.Name) (eq (get $labels "app.kubernetes.io/component" | default "") "router") -}}
{{- if and $ours (or (ne .metadata.name $fullname) (ne (get $labels "app.kubernetes.io/name") (include "inference-api.name" $))) }}
{{ printf "nameOverride and fullnameOverride are for a first install: the router is the Deployment %s, and would be %s, with all pods of the release replaced at once; take them back, or install another release beside this one" .metadata.name $fullname }}
{{- end -}}
{{- end -}}
{{- end -}}
{{- end -}}

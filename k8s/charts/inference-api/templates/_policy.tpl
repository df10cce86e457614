{{/* Keys, limits and usage: what the router is told of them, where it finds them, and what does not go together. */}}

{{/* Not empty: the policy is from a control plane; the chart's own gives it where no other is named. */}}
{{- define "inference-api.policyFromRegistry" -}}
{{- with .Values.router.policy -}}
{{- $wanted := .fromRegistry -}}
{{- if not (kindIs "bool" $wanted) }}{{ $wanted = and (include "inference-api.control" $) (not .document) (not .existingSecret) }}{{ end -}}
{{- if $wanted }}true{{ end -}}
{{- end -}}
{{- end -}}

{{/* Where usage records go. */}}
{{- define "inference-api.usageMode" -}}
{{- .Values.router.usage.mode | default (include "inference-api.control" . | empty | ternary "none" "registry") -}}
{{- end -}}

{{/* Where the policy is from, as the router has it: a path, `registry`, or nothing. */}}
{{- define "inference-api.policySource" -}}
{{- with .Values.router.policy -}}
{{- if include "inference-api.policyFromRegistry" $ }}registry{{ else if or .document .existingSecret }}/etc/inference-api-policy/policy.yaml{{ end -}}
{{- end -}}
{{- end -}}

{{/* The Secret with the policy; empty: none. */}}
{{- define "inference-api.policySecret" -}}
{{- with .Values.router.policy -}}
{{- if .existingSecret }}{{ .existingSecret }}{{ else if .document }}{{ printf "%s-policy" (include "inference-api.fullname" $) }}{{ end -}}
{{- end -}}
{{- end -}}

{{/* Not empty: records that wait have a place on disk. */}}
{{- define "inference-api.spools" -}}
{{- if and (eq (include "inference-api.usageMode" .) "registry") .Values.router.usage.spool.enabled }}true{{ end -}}
{{- end -}}

{{/* The claim of the spool; empty: it is an emptyDir. */}}
{{- define "inference-api.spoolClaim" -}}
{{- $claim := .Values.router.usage.spool.persistence -}}
{{- if and (include "inference-api.spools" .) (or $claim.enabled $claim.existingClaim) -}}
{{- $claim.existingClaim | default (printf "%s-usage" (include "inference-api.fullname" .)) -}}
{{- end -}}
{{- end -}}

{{/* The least number of routers that there are, one at least. */}}
{{- define "inference-api.routers" -}}
{{- $router := .Values.router -}}
{{- $pods := int $router.replicaCount -}}
{{- range list $router.autoscaling $router.keda }}{{ if .enabled }}{{ $pods = int .minReplicas }}{{ end }}{{ end -}}
{{- max 1 $pods -}}
{{- end -}}

{{/* Settings of these features, as JSON; none of those that are off. */}}
{{- define "inference-api.policySettings" -}}
{{- $router := .Values.router -}}
{{- $settings := dict -}}
{{- if eq $router.auth.mode "keys" }}{{ $_ := set $settings "AUTH" "keys" }}{{ end -}}
{{- with include "inference-api.policySource" . -}}
{{- $_ := set $settings "POLICY" . -}}
{{- if eq . "registry" }}{{ $_ := set $settings "POLICY_CACHE" "/var/lib/inference-api-policy/policy.json" }}{{ end -}}
{{- $_ := set $settings "LIMITS" $router.rateLimits.store -}}
{{- $_ := set $settings "LIMITS_ON_FAILURE" $router.rateLimits.onFailure -}}
{{- $share := $router.rateLimits.share -}}
{{- if kindIs "invalid" $share }}{{ $share = include "inference-api.routers" $ | int }}{{ end -}}
{{- $_ := set $settings "LIMITS_SHARE" (int $share) -}}
{{- end -}}
{{- with $router.trustedProxies }}{{ $_ := set $settings "TRUSTED_PROXIES" . }}{{ end -}}
{{- with include "inference-api.usageMode" . }}{{ if ne . "none" }}{{ $_ := set $settings "USAGE" . }}{{ end }}{{ end -}}
{{- if include "inference-api.spools" . }}{{ $_ := set $settings "USAGE_SPOOL" "/var/lib/inference-api-usage" }}{{ end -}}
{{- with $router.currency }}{{ $_ := set $settings "CURRENCY" . }}{{ end -}}
{{- toJson $settings -}}
{{- end -}}

{{/* Where the router's container has all this, as a list. */}}
{{- define "inference-api.policyMounts" -}}
{{- if include "inference-api.policySecret" . }}
# A folder, not a file of it: only so does a change of the Secret arrive, and the router reads it again.
- {name: policy, mountPath: /etc/inference-api-policy, readOnly: true}
{{- end }}
{{- if include "inference-api.policyFromRegistry" . }}
- {name: policy-cache, mountPath: /var/lib/inference-api-policy}
{{- end }}
{{- if include "inference-api.spools" . }}
- {name: usage-spool, mountPath: /var/lib/inference-api-usage}
{{- end }}
{{- end -}}

{{- define "inference-api.policyVolumes" -}}
{{- $router := .Values.router -}}
{{- with include "inference-api.policySecret" . }}
- name: policy
  projected:
    defaultMode: 288 # 0440
    sources:
      - secret: {name: {{ . | quote }}, items: [{key: {{ empty $router.policy.existingSecret | ternary "policy.yaml" $router.policy.existingSecretKey | quote }}, path: policy.yaml}]}
{{- end }}
{{- if include "inference-api.policyFromRegistry" . }}
- name: policy-cache
  emptyDir: {sizeLimit: {{ $router.policy.cacheSizeLimit }}}
{{- end }}
{{- if include "inference-api.spools" . }}
- name: usage-spool
  {{- with include "inference-api.spoolClaim" . }}
  persistentVolumeClaim: {claimName: {{ . | quote }}}
  {{- else }}
  emptyDir: {sizeLimit: {{ $router.usage.spool.sizeLimit }}}
  {{- end }}
{{- end }}
{{- end -}}

{{/* The bytes of all emptyDirs of a router, as a quantity. */}}
{{- define "inference-api.routerDisk" -}}
{{- $router := .Values.router -}}
{{- $sizes := list $router.tmpSizeLimit -}}
{{- if include "inference-api.policyFromRegistry" . }}{{ $sizes = append $sizes $router.policy.cacheSizeLimit }}{{ end -}}
{{- if and (include "inference-api.spools" .) (not (include "inference-api.spoolClaim" .)) }}{{ $sizes = append $sizes $router.usage.spool.sizeLimit }}{{ end -}}
{{- if eq (len $sizes) 1 -}}
{{- first $sizes -}}
{{- else -}}
{{- $bytes := 0 -}}
{{- range $sizes }}{{ $bytes = add $bytes (include "inference-api.bytes" . | int64) }}{{ end -}}
{{- printf "%dMi" (div (add $bytes 1048575) 1048576) -}}
{{- end -}}
{{- end -}}

{{/* What the router would refuse at its start, and what would do nothing; a line each. */}}
{{- define "inference-api.policyProblems" -}}
{{- $router := .Values.router -}}
{{- $policy := $router.policy -}}
{{- $source := include "inference-api.policySource" . -}}
{{- $given := list -}}
{{- range $name := list "document" "existingSecret" "fromRegistry" }}{{ if get $policy $name }}{{ $given = append $given (printf "router.policy.%s" $name) }}{{ end }}{{ end -}}
{{- if gt (len $given) 1 }}
{{ printf "%s are all given, and there is one policy: leave the others empty" (join " and " $given) }}
{{- end -}}
{{- if and (eq $router.auth.mode "keys") (not $source) }}
{{ print "router.auth.mode is keys, and there is no policy with keys: give router.policy.document, existingSecret or fromRegistry" }}
{{- end -}}
{{- $asks := list -}}
{{- if include "inference-api.policyFromRegistry" . }}{{ $asks = append $asks "router.policy.fromRegistry" }}{{ end -}}
{{- if eq (include "inference-api.usageMode" .) "registry" }}{{ $asks = append $asks "router.usage.mode registry" }}{{ end -}}
{{- with $asks -}}
{{- if not (include "inference-api.registryUrl" $) }}
{{ printf "%s: there is no control plane: set router.registry.url, or registry.kind to control-plane" (join " and " .) }}
{{- else if include "inference-api.stub" $ }}
{{ printf "%s: the chart's own registry has models only, no policy, and takes no usage: set registry.kind to control-plane, or router.registry.url to one, and registry.enabled to false" (join " and " .) }}
{{- end -}}
{{- end -}}
{{- $limits := $router.rateLimits -}}
{{- if and (eq $limits.store "redis") (not $limits.redis.existingSecret) }}
{{ print "router.rateLimits.store is redis: name the Secret with its URL in router.rateLimits.redis.existingSecret" }}
{{- end -}}
{{- if and (eq $limits.store "redis") (not $source) }}
{{ print "router.rateLimits.store is redis, and there is no policy with limits to count: give router.policy.document, existingSecret or fromRegistry" }}
{{- end -}}
{{- if eq $router.auth.mode "keys" -}}
{{- range $name, $model := .Values.models -}}
{{- if eq (toString $model.credentials) "passthrough" }}
{{ printf "models.%s.credentials is passthrough, and with router.auth.mode keys what clients send is a key of the router's: name the backend's own in credentials.env or credentials.file" $name }}
{{- end -}}
{{- end -}}
{{- end -}}
{{- $claim := $router.usage.spool.persistence -}}
{{- if and (include "inference-api.spoolClaim" .) (not $claim.existingClaim) (gt (include "inference-api.mostRouters" . | int) 1) (not (has "ReadWriteMany" $claim.accessModes)) }}
{{ printf "router.usage.spool.persistence.accessModes is %s, and several pods share the volume: set it to [ReadWriteMany], or set persistence.enabled to false" (join ", " $claim.accessModes) }}
{{- end -}}
{{- include "inference-api.documentProblems" . -}}
{{- end -}}

{{/* The largest number of routers at once: a rollout of one makes two. */}}
{{- define "inference-api.mostRouters" -}}
{{- $router := .Values.router -}}
{{- $pods := kindIs "invalid" $router.replicaCount | ternary 2 (int $router.replicaCount) -}}
{{- range list $router.autoscaling $router.keda }}{{ if .enabled }}{{ $pods = int .maxReplicas }}{{ end }}{{ end -}}
{{- $pods -}}
{{- end -}}

{{/* Of a policy in these values, what the router would refuse as a whole. */}}
{{- define "inference-api.documentProblems" -}}
{{- $policy := .Values.router.policy.document -}}
{{- $names := list -}}
{{- range $index, $organisation := $policy.organisations -}}
{{- if has $organisation.name $names }}
{{ printf "router.policy.document.organisations.%d.name: %s is given twice" $index $organisation.name }}
{{- end -}}
{{- $names = append $names $organisation.name -}}
{{- end -}}
{{- $ids := list -}}
{{- $digests := list -}}
{{- range $index, $key := $policy.keys -}}
{{- if has $key.id $ids }}
{{ printf "router.policy.document.keys.%d.id: %s is given twice" $index $key.id }}
{{- end -}}
{{- $ids = append $ids $key.id -}}
{{- if and $key.organisation (not (has $key.organisation $names)) }}
{{ printf "router.policy.document.keys.%d.organisation: %s is not in organisations" $index $key.organisation }}
{{- end -}}
{{- range list $key.digest (dig "digest" "" ($key.previous | default dict)) -}}
{{- if and . (has . $digests) }}
{{ printf "router.policy.document.keys.%d: its digest is given twice, and each key has its own" $index }}
{{- end -}}
{{- $digests = append $digests . -}}
{{- end -}}
{{- end -}}
{{- if and (contains "hmac-sha256:" (join " " $digests)) (not .Values.router.auth.pepper.existingSecret) }}
{{ print "router.policy.document has hmac-sha256 digests, which nobody can check without their pepper: name its Secret in router.auth.pepper.existingSecret" }}
{{- end -}}
{{- $size := toYaml $policy | len -}}
{{- if gt $size 1000000 }}
{{ printf "router.policy.document is %d bytes, and a Secret holds 1 MiB: keep it in a control plane, and set router.policy.fromRegistry" $size }}
{{- end -}}
{{- end -}}

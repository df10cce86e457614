{{/* What a schema cannot say: values that do not go together. One line each, all at once. */}}
{{- define "inference-api.validate" -}}
{{- $wrong := list -}}
{{- $router := .Values.router -}}
{{- if and $router.autoscaling.enabled $router.keda.enabled -}}
{{- $wrong = append $wrong "router.autoscaling.enabled and router.keda.enabled exclude each other: both would set the number of replicas; turn one off" -}}
{{- end -}}
{{- range $name := list "autoscaling" "keda" -}}
{{- $scaler := index $router $name -}}
{{- if and $scaler.enabled (gt (int $scaler.minReplicas) (int $scaler.maxReplicas)) -}}
{{- $wrong = append $wrong (printf "router.%s.minReplicas (%d) is more than router.%s.maxReplicas (%d)" $name (int $scaler.minReplicas) $name (int $scaler.maxReplicas)) -}}
{{- end -}}
{{- end -}}
{{- if and $router.autoscaling.enabled (not (dig "requests" "cpu" "" $router.resources)) -}}
{{- $wrong = append $wrong "router.autoscaling needs router.resources.requests.cpu: its target is a share of that" -}}
{{- end -}}
{{- if and $router.keda.enabled (not $router.keda.serverAddress) -}}
{{- $wrong = append $wrong "router.keda needs router.keda.serverAddress, the URL of Prometheus" -}}
{{- end -}}
{{- if and (not (kindIs "invalid" $router.podDisruptionBudget.minAvailable)) (not (kindIs "invalid" $router.podDisruptionBudget.maxUnavailable)) -}}
{{- $wrong = append $wrong "router.podDisruptionBudget takes minAvailable or maxUnavailable, not both; set the other one to null" -}}
{{- end -}}
{{- $budget := $router.podDisruptionBudget -}}
{{- $pods := int $router.replicaCount -}}
{{- range list $router.autoscaling $router.keda }}{{ if .enabled }}{{ $pods = int .minReplicas }}{{ end }}{{ end -}}
{{- $least := int $budget.minAvailable -}}
{{- if kindIs "string" $budget.minAvailable -}}
{{- /* Rounded up, as Kubernetes does. */}}
{{- $least = div (add 99 (mul $pods (trimSuffix "%" $budget.minAvailable | int))) 100 | int -}}
{{- end -}}
{{- if and $budget.enabled $least (ge $least $pods) -}}
{{- $wrong = append $wrong (printf "router.podDisruptionBudget.minAvailable (%v) is all of the %d pods that there may be: no node could ever be drained; lower it, or set maxUnavailable instead" $budget.minAvailable $pods) -}}
{{- end -}}
{{- if eq (int $router.ports.http) (int $router.ports.ops) -}}
{{- $wrong = append $wrong (printf "router.ports.http and router.ports.ops are both %d: probes and metrics need a port of their own" (int $router.ports.http)) -}}
{{- end -}}
{{- if lt (int64 $router.limits.maxBufferedBytes) (int64 $router.limits.maxBodyBytes) -}}
{{- $wrong = append $wrong (printf "router.limits.maxBufferedBytes (%d) is less than one body of router.limits.maxBodyBytes (%d): raise it to a multiple of that" (int64 $router.limits.maxBufferedBytes) (int64 $router.limits.maxBodyBytes)) -}}
{{- end -}}
{{- $memory := dig "limits" "memory" "" $router.resources -}}
{{- if and $memory (le (include "inference-api.bytes" $memory | int64) (int64 $router.limits.maxBufferedBytes)) -}}
{{- $wrong = append $wrong (printf "router.resources.limits.memory (%v) has no room for router.limits.maxBufferedBytes (%d): the pod would be killed with all of its streams; raise the one, or lower the other" $memory (int64 $router.limits.maxBufferedBytes)) -}}
{{- end -}}
{{- range $router.extraEnv -}}
{{- if hasPrefix "INFERENCE_API_" (upper (.name | default "")) -}}
{{- $wrong = append $wrong (printf "router.extraEnv sets %s, which would go past the value that the chart computes with: use router.settings, or the value of its own" .name) -}}
{{- end -}}
{{- end -}}
{{- $longest := include "inference-api.longestRequest" . | int -}}
{{- if lt (floor $router.drain.timeoutSeconds | int) $longest -}}
{{- $wrong = append $wrong (printf "router.drain.timeoutSeconds (%v) is shorter than the longest request (%d s, of router.timeouts.stream, router.timeouts.total and models.*.timeouts.total): a rollout would cut streams; raise it, or lower those" $router.drain.timeoutSeconds $longest) -}}
{{- end -}}
{{- if and .Values.registry.enabled $router.registry.url -}}
{{- $wrong = append $wrong "router.registry.url is set, so nobody would use the chart's own registry; set registry.enabled to false, or leave the url empty" -}}
{{- end -}}
{{- if and (not .Values.models) (not (include "inference-api.registryUrl" .)) -}}
{{- $wrong = append $wrong "there is nothing to serve: give models, or router.registry.url, or set registry.enabled to true" -}}
{{- end -}}
{{- if and (include "inference-api.watchesSlices" .) (not $router.rbac.create) (or $router.serviceAccount.create (not $router.serviceAccount.name)) -}}
{{- $wrong = append $wrong "router.discovery.mode endpointslices needs the right to watch them: set router.rbac.create to true, or name a service account that has it" -}}
{{- end -}}
{{- if and (include "inference-api.watchesSlices" .) (eq (include "inference-api.automount" .) "false") -}}
{{- $wrong = append $wrong "router.discovery.mode endpointslices needs the token of its service account: leave router.serviceAccount.automount null" -}}
{{- end -}}
{{- if and (include "inference-api.watchesSlices" .) $router.rbac.create -}}
{{- $namespaces := prepend $router.discovery.namespaces .Release.Namespace -}}
{{- range $name, $model := .Values.models }}{{ range $model.backends -}}
{{- /* As the router reads it: service.namespace, or service.namespace.svc with or without the cluster's domain. */}}
{{- $labels := splitList "." (urlParse .url).hostname -}}
{{- $namespace := index (append $labels "") 1 -}}
{{- $watched := and (eq (.discovery | default "static") "dns") (or (eq (len $labels) 2) (eq (index (concat $labels (list "" "")) 2) "svc")) -}}
{{- if and $watched (not (has $namespace $namespaces)) -}}
{{- $wrong = append $wrong (printf "models.%s: %s is in the namespace %s, where the router may not watch EndpointSlices; add it to router.discovery.namespaces" $name .url $namespace) -}}
{{- end -}}
{{- end }}{{ end -}}
{{- end -}}
{{- if and $router.registry.required (not (include "inference-api.registryUrl" .)) -}}
{{- $wrong = append $wrong "router.registry.required is set, and there is no registry to wait for: set registry.enabled, or router.registry.url" -}}
{{- end -}}
{{- if and (include "inference-api.stub" .) (eq (int .Values.registry.service.port) (int .Values.registry.opsPort)) -}}
{{- $wrong = append $wrong (printf "registry.service.port and registry.opsPort are both %d: who reads metrics must not reach the port that takes changes" (int .Values.registry.opsPort)) -}}
{{- end -}}
{{- $service := $router.service -}}
{{- if and (ne $service.type "LoadBalancer") (or $service.loadBalancerClass $service.loadBalancerSourceRanges) -}}
{{- $wrong = append $wrong (printf "router.service.loadBalancerClass and loadBalancerSourceRanges are for the type LoadBalancer, and router.service.type is %s" $service.type) -}}
{{- end -}}
{{- if and (eq $service.type "ClusterIP") $service.externalTrafficPolicy -}}
{{- $wrong = append $wrong "router.service.externalTrafficPolicy is for the types LoadBalancer and NodePort, and router.service.type is ClusterIP" -}}
{{- end -}}
{{- if and $router.ingress.enabled (not $router.ingress.hosts) -}}
{{- $wrong = append $wrong "router.ingress needs router.ingress.hosts" -}}
{{- end -}}
{{- if and $router.httpRoute.enabled (not $router.httpRoute.parentRefs) -}}
{{- $wrong = append $wrong "router.httpRoute needs router.httpRoute.parentRefs, the Gateways that it attaches to" -}}
{{- end -}}
{{- if and .Values.monitoring.otel.enabled (not .Values.monitoring.otel.endpoint) -}}
{{- $wrong = append $wrong "monitoring.otel needs monitoring.otel.endpoint, the URL of a collector" -}}
{{- end -}}
{{- $more := list (include "inference-api.modelProblems" .) (include "inference-api.catalogueProblems" .) (include "inference-api.policyProblems" .) (include "inference-api.controlProblems" .) (include "inference-api.liveProblems" .) -}}
{{- range $more }}{{ range splitList "\n" . }}{{ with trim . }}{{ $wrong = append $wrong . }}{{ end }}{{ end }}{{ end -}}
{{- $alerts := list -}}
{{- range $path, $_ := .Files.Glob "files/rules/*.yaml" }}{{ range ($.Files.Get $path | fromYaml).groups }}{{ range .rules }}{{ $alerts = append $alerts (.alert | default "") }}{{ end }}{{ end }}{{ end -}}
{{- range .Values.monitoring.prometheusRule.disabled -}}
{{- if not (has . $alerts) -}}
{{- $wrong = append $wrong (printf "monitoring.prometheusRule.disabled names %s, and there is no such alert: they are in k8s/charts/inference-api/files/rules" .) -}}
{{- end -}}
{{- end -}}
{{- $images := dict "image" .Values.image "engines.images.vllm" .Values.engines.images.vllm "engines.images.tgi" .Values.engines.images.tgi -}}
{{- range $name, $model := .Values.models }}{{ with dig "image" dict ($model.deploy | default dict) }}{{ $_ := set $images (printf "models.%s.deploy.image" $name) (merge (dict) . (dict "tag" "" "digest" "")) }}{{ end }}{{ end -}}
{{- range $place, $image := $images -}}
{{- if and (eq $image.tag "latest") (not $image.digest) -}}
{{- $wrong = append $wrong (printf "%s.tag is latest, which is another image tomorrow: name a release, or a digest" $place) -}}
{{- end -}}
{{- end -}}
{{- if $wrong -}}
{{- fail (printf "\n%s" (join "\n" $wrong)) -}}
{{- end -}}
{{- end -}}

{{/* Labels of every object; takes {root, component}. */}}
{{- define "blobcache.labels" -}}
helm.sh/chart: {{ printf "%s-%s" .root.Chart.Name .root.Chart.Version | replace "+" "_" | trunc 63 | trimSuffix "-" | quote }}
{{ include "blobcache.selectorLabels" . }}
app.kubernetes.io/version: {{ .root.Chart.AppVersion | replace "+" "_" | trunc 63 | quote }}
app.kubernetes.io/part-of: "blobcache"
app.kubernetes.io/managed-by: {{ .root.Release.Service | quote }}
{{- with .root.Values.commonLabels }}
{{ toYaml . }}
{{- end }}
{{- end }}

{{/* What selects pods; never a version, for selectors cannot change. Takes {root, component}. */}}
{{- define "blobcache.selectorLabels" -}}
app.kubernetes.io/name: "blobcache"
app.kubernetes.io/instance: {{ .root.Release.Name | quote }}
app.kubernetes.io/component: {{ .component | quote }}
{{- end }}

{{/* Image by digest, else by tag; takes {root, image}. */}}
{{- define "blobcache.image" -}}
{{- if .image.digest -}}
{{ .image.repository }}@{{ .image.digest }}
{{- else -}}
{{ .image.repository }}:{{ default .root.Chart.AppVersion .image.tag }}
{{- end -}}
{{- end }}

{{- define "blobcache.operatorServiceAccount" -}}
{{ default (ternary "blobcache-operator" "default" .Values.operator.serviceAccount.create) .Values.operator.serviceAccount.name }}
{{- end }}

{{- define "blobcache.agentServiceAccount" -}}
{{ default (ternary "blobcache-agent" "default" .Values.agent.serviceAccount.create) .Values.agent.serviceAccount.name }}
{{- end }}

{{/* The subject of all of the operator's bindings. */}}
{{- define "blobcache.operatorSubject" -}}
- kind: ServiceAccount
  name: {{ include "blobcache.operatorServiceAccount" . | quote }}
  namespace: {{ .Release.Namespace | quote }}
{{- end }}

{{/* A pod's pull secrets. */}}
{{- define "blobcache.pullSecrets" -}}
{{- with .Values.imagePullSecrets }}
imagePullSecrets:
  {{- range . }}
  - name: {{ . | quote }}
  {{- end }}
{{- end }}
{{- end }}

{{/*
Refuse clusters whose API server cannot check the CRDs' rules. Not `kubeVersion` in Chart.yaml: a helm
built from source takes 1.20 for granted when it renders without a cluster.
*/}}
{{- define "blobcache.checkKubernetes" -}}
{{- if and (semverCompare "<1.30.0-0" .Capabilities.KubeVersion.Version) (not (semverCompare "~1.20.0-0" .Capabilities.KubeVersion.Version)) -}}
{{- fail (printf "Blobcache needs Kubernetes 1.30 or later, this is %s" .Capabilities.KubeVersion.Version) -}}
{{- end -}}
{{- end }}

{{/* To the reader's own node where the API server knows that word (1.34), else near it (1.31). */}}
{{- define "blobcache.trafficDistribution" -}}
{{- $version := .Capabilities.KubeVersion.Version -}}
{{- if .Values.agent.trafficDistribution -}}
{{ .Values.agent.trafficDistribution }}
{{- else if semverCompare "~1.30.0-0" $version -}}
{{- else if semverCompare ">=1.31.0-0 <1.34.0-0" $version -}}
PreferClose
{{- else -}}
PreferSameNode
{{- end -}}
{{- end }}

{{/* Name of the volume of a LocalFS root, which is a path: fixed length, valid, one per path. */}}
{{- define "blobcache.localFSVolume" -}}
localfs-{{ sha256sum . | trunc 16 }}
{{- end }}

{{/* All LocalFS roots, each once, as a JSON list. */}}
{{- define "blobcache.localFSDirectories" -}}
{{- $all := list -}}
{{- range .Values.agent.localFSRoots -}}
{{- $all = concat $all . -}}
{{- end -}}
{{ $all | uniq | sortAlpha | toJson }}
{{- end }}

{{/* What `helm test` reads: 120 KiB, several chunks, the same in every rendering. */}}
{{- define "blobcache.selfTestBlob" -}}
{{- range $line := until 3000 -}}
{{ printf "Blobcache's self-test: line %06d of 3000\n" $line }}
{{- end -}}
{{- end }}

{{/* Where the agent has it; nothing else is there. */}}
{{- define "blobcache.selfTestDirectory" -}}
/usr/share/blobcache/selftest
{{- end }}

{{/* How an uninstallation ends; takes the weight, the order of creation. */}}
{{- define "blobcache.cleanupHook" -}}
helm.sh/hook: post-delete
helm.sh/hook-weight: {{ . | quote }}
helm.sh/hook-delete-policy: before-hook-creation,hook-succeeded
{{- end }}

{{/* "true" where there is a hook: somebody must give it rights. */}}
{{- define "blobcache.cleanup" -}}
{{- if and .Values.cleanup.enabled (or .Values.rbac.create .Values.cleanup.serviceAccountName) -}}
true
{{- end -}}
{{- end }}

{{/* "true" where the hook's rights are made with it. */}}
{{- define "blobcache.cleanupOwnsRights" -}}
{{- if and .Values.cleanup.enabled .Values.rbac.create (not .Values.cleanup.serviceAccountName) -}}
true
{{- end -}}
{{- end }}

{{/* "true" where nodes have something to be put back. */}}
{{- define "blobcache.cleanupNodes" -}}
{{- if and (include "blobcache.cleanup" .) (or .Values.cleanup.cache .Values.containerdMirror.enabled) -}}
true
{{- end -}}
{{- end }}

{{/* Root without capabilities: what a hostPath needs, and no more. */}}
{{- define "blobcache.nodeSecurityContext" -}}
runAsUser: 0
runAsGroup: 0
privileged: false
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities:
  drop: ["ALL"]
{{- end }}

{{/* For containers that do one small thing. */}}
{{- define "blobcache.smallResources" -}}
requests:
  cpu: 10m
  memory: 64Mi
limits:
  memory: 128Mi
{{- end }}

{{/* Two entries for one registry would be one too many: only one may answer for it. */}}
{{- define "blobcache.checkMirror" -}}
{{- if .Values.containerdMirror.enabled -}}
{{- if not .Values.agent.hostPort.enabled -}}
{{- fail "containerdMirror needs agent.hostPort.enabled: containerd asks 127.0.0.1:7080 of its node" -}}
{{- end -}}
{{- $hosts := list -}}
{{- range .Values.containerdMirror.configs -}}
{{- if has .host $hosts -}}
{{- fail (printf "containerdMirror.configs names the host '%s' twice; one config may answer for it" .host) -}}
{{- end -}}
{{- $hosts = append $hosts .host -}}
{{- end -}}
{{- end -}}
{{- end }}

{{/* How metrics are fetched; takes {monitor}. Agents' `namespace` is the config's, so it is kept. */}}
{{- define "blobcache.scrape" -}}
path: /metrics
honorLabels: true
interval: {{ .monitor.interval | quote }}
relabelings:
  - sourceLabels: ["__meta_kubernetes_pod_node_name"]
    targetLabel: node
  {{- with .monitor.relabelings }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
{{- with .monitor.metricRelabelings }}
metricRelabelings:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end }}

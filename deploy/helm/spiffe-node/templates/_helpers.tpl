{{/* Names are fixed, not made from the release's: people and documents know them. */}}
{{- define "spiffe-node.name" -}}spiffe-node{{- end }}

{{/* Cluster-scoped objects carry the namespace, so that two releases can live side by side. */}}
{{- define "spiffe-node.clusterScoped" -}}
{{ printf "%s-%s" .root.Release.Namespace .part | trunc 63 | trimSuffix "-" }}
{{- end }}

{{- define "spiffe-node.chart" -}}
{{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" | trunc 63 | trimSuffix "-" }}
{{- end }}

{{- define "spiffe-node.selector" -}}
app.kubernetes.io/name: {{ include "spiffe-node.name" .root }}
app.kubernetes.io/instance: {{ .root.Release.Name }}
app.kubernetes.io/component: {{ .component }}
{{- end }}

{{- define "spiffe-node.labels" -}}
{{ include "spiffe-node.selector" . }}
app.kubernetes.io/part-of: spiffe-node
app.kubernetes.io/version: {{ .root.Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .root.Release.Service }}
helm.sh/chart: {{ include "spiffe-node.chart" .root }}
{{- end }}

{{- define "spiffe-node.image" -}}
{{- $i := .root.Values.image -}}
{{- $registry := .root.Values.global.spire.image.registry | default $i.registry -}}
{{- $tag := $i.tag | default .root.Chart.AppVersion -}}
{{- $path := list $registry $i.repository .name | compact | join "/" -}}
{{- if hasPrefix "sha256:" $tag }}{{ fail "image.tag is a digest, but there are several images; pin them in your mirror and name its tag" }}{{ end -}}
{{ printf "%s:%s" $path $tag }}
{{- end }}

{{- define "spiffe-node.pullSecrets" -}}
{{- with .Values.global.imagePullSecrets }}
imagePullSecrets:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end }}

{{- define "spiffe-node.selinux" -}}
{{- if or .Values.selinux.enabled .Values.global.openshift }}true{{ end -}}
{{- end }}

{{- define "spiffe-node.embedded" -}}
{{- if eq .Values.authority.mode "embedded" }}true{{ end -}}
{{- end }}

{{- define "spiffe-node.authorityAddress" -}}
{{- if include "spiffe-node.embedded" . -}}
{{ printf "%s.%s.svc.%s:%d" .Values.authority.embedded.name .Release.Namespace .Values.global.spire.clusterDomain (int .Values.authority.embedded.service.port) }}
{{- else -}}
{{ .Values.authority.external.address }}
{{- end -}}
{{- end }}

{{/* The ConfigMap with the bundle by which agents know the server at first. */}}
{{- define "spiffe-node.bundle" -}}
{{- if include "spiffe-node.embedded" . -}}
{{- dict "configMap" "spire-bundle" "key" "bundle.spiffe" "format" "spiffe" | toYaml }}
{{- else -}}
{{- .Values.authority.external.trustBundle | toYaml }}
{{- end -}}
{{- end }}

{{/* The bundle is mounted, unless it is read through the API server or fetched. */}}
{{- define "spiffe-node.bundleMounted" -}}
{{- $b := include "spiffe-node.bundle" . | fromYaml -}}
{{- if not (or $b.namespace $b.url) }}true{{ end -}}
{{- end }}

{{/* How agents find their first bundle. */}}
{{- define "spiffe-node.trustBundle" -}}
{{- $b := include "spiffe-node.bundle" . | fromYaml -}}
{{- if $b.url -}}
{{- dict "url" $b.url "format" $b.format | toYaml }}
{{- else if $b.namespace -}}
{{- dict "configMap" (dict "namespace" $b.namespace "name" $b.configMap "key" $b.key) "format" $b.format | toYaml }}
{{- else -}}
{{- dict "path" (printf "/run/spire/bundle/%s" $b.key) "format" $b.format | toYaml }}
{{- end -}}
{{- end }}

{{/* An agent attests by x509pop. */}}
{{- define "spiffe-node.x509pop" -}}
{{- if and (not (include "spiffe-node.embedded" .)) (eq .Values.authority.external.nodeAttestation.type "x509pop") }}true{{ end -}}
{{- end }}

{{/* How agents prove their node. */}}
{{- define "spiffe-node.agentAttestation" -}}
{{- if include "spiffe-node.x509pop" . -}}
{{- $x := .Values.authority.external.nodeAttestation.x509pop -}}
{{- $a := dict "type" "x509pop" "certificatePath" (printf "/run/spiffe-node-x509pop/%s" $x.certificate) "privateKeyPath" (printf "/run/spiffe-node-x509pop/%s" $x.privateKey) -}}
{{- if $x.intermediates }}{{ $_ := set $a "intermediatesPath" (printf "/run/spiffe-node-x509pop/%s" $x.intermediates) }}{{ end -}}
{{- $a | toYaml }}
{{- else -}}
{{- dict "type" "k8s_psat" "cluster" .Values.global.spire.clusterName "tokenPath" "/var/run/secrets/tokens/spire-agent" | toYaml }}
{{- end -}}
{{- end }}

{{/* The agent's configuration: what the chart knows, then what the user says. */}}
{{- define "spiffe-node.agentConfig" -}}
{{- $v := .Values -}}
{{- $sds := $v.node.agent.sds -}}
{{- $server := dict
  "address" (include "spiffe-node.authorityAddress" .)
  "trustBundle" (include "spiffe-node.trustBundle" . | fromYaml)
  "nodeAttestation" (include "spiffe-node.agentAttestation" . | fromYaml)
-}}
{{- if not (include "spiffe-node.embedded" .) }}
{{- $e := $v.authority.external }}
{{- $server = mergeOverwrite $server (dict "rebootstrap" (deepCopy $e.rebootstrap) "requirePQKEM" $e.requirePQKEM "syncInterval" $e.syncInterval "withdrawConfirm" $e.withdrawConfirm) }}
{{- end }}
{{- $c := dict
  "apiVersion" "config.spiffe-node.io/v1alpha1"
  "kind" "AgentConfiguration"
  "trustDomain" $v.global.spire.trustDomain
  "mode" "kubernetes"
  "socket" (dict "directory" $v.socket.directory "name" $v.socket.name "alternateNames" $v.socket.alternateNames)
  "admin" (dict "socketPath" "/run/spiffe-node-admin/private/api.sock")
  "authority" (dict "spireServer" $server)
  "attestation" (dict "kubernetes" (dict
    "ledgerDirectory" (printf "%s/ledger" $v.stateDirectory)
    "pods" $v.node.agent.pods))
  "identity" (dict "stateDirectory" (eq $v.stateDirectory "/run/spiffe-node" | ternary "auto" (printf "%s/state" $v.stateDirectory)))
  "sds" $sds
  "health" (dict "address" (printf ":%d" (int $v.node.agent.healthPort)))
  "log" (dict "level" $v.node.agent.logLevel "format" $v.node.agent.logFormat)
-}}
{{- if $v.node.agent.inspect.enabled }}
{{- $_ := set $c "inspect" (dict "address" (printf "127.0.0.1:%d" (int $v.node.agent.inspect.port))) }}
{{- end }}
{{- mergeOverwrite $c (deepCopy $v.node.agent.config) | toYaml }}
{{- end }}

{{/* The Secret with the bundle endpoint's certificate; empty: it uses the SVID. */}}
{{- define "spiffe-node.federationSecret" -}}
{{- $f := .Values.authority.embedded.federation -}}
{{- if and $f.enabled $f.tls.externalSecret.enabled }}{{ $f.tls.externalSecret.secretName }}{{ end -}}
{{- end }}

{{/* The authority's configuration, likewise. */}}
{{- define "spiffe-node.authorityConfig" -}}
{{- $v := .Values -}}
{{- $e := $v.authority.embedded -}}
{{- $subject := dict "country" (list $e.caSubject.country | compact) "organization" (list $e.caSubject.organization | compact) "commonName" $e.caSubject.commonName -}}
{{- $c := dict
  "apiVersion" "config.spiffe-node.io/v1alpha1"
  "kind" "AuthorityConfiguration"
  "trustDomain" $v.global.spire.trustDomain
  "server" (dict "address" ":8081")
  "admin" (dict "socketPath" "/tmp/spire-server/private/api.sock")
  "embedded" (dict
    "statePath" "/var/lib/spiffe-node/state/authority.db"
    "caKeyType" $e.caKeyType
    "caTTL" $e.caTTL
    "caSubject" $subject
    "defaultX509SVIDTTL" $e.defaultX509SVIDTTL
    "defaultJWTSVIDTTL" $e.defaultJWTSVIDTTL
    "jwtIssuer" $e.jwtIssuer)
  "nodeAttestation" (dict "k8sPSAT" (dict
    "cluster" $v.global.spire.clusterName
    "serviceAccountAllowList" (list (printf "%s:%s" .Release.Namespace $v.node.serviceAccount.name))
    "audience" (list "spire-server")))
  "registration" (dict
    "enabled" $v.registration.enabled
    "clusterDomain" $v.global.spire.clusterDomain
    "className" $v.registration.className
    "ignoreNamespaces" $v.registration.ignoreNamespaces)
  "health" (dict "address" (printf ":%d" (int $e.healthPort)))
  "log" (dict "level" $e.logLevel "format" $e.logFormat)
-}}
{{- if $e.nodeAttestation.x509pop.enabled }}
{{- $_ := set $c.nodeAttestation "x509pop" (dict "mode" "external_pki" "caBundlePaths" (list (printf "/etc/spiffe-node-x509pop/%s" $e.nodeAttestation.x509pop.key))) }}
{{- end }}
{{- if $e.federation.enabled }}
{{- $endpoint := dict
  "address" (printf "%s:%d" $e.federation.bundleEndpoint.address (int $e.federation.bundleEndpoint.port))
  "refreshHint" $e.federation.bundleEndpoint.refreshHint -}}
{{- if include "spiffe-node.federationSecret" . }}
{{- $_ := merge $endpoint (dict "profile" "https_web" "certFile" "/etc/spiffe-node-federation/tls.crt" "keyFile" "/etc/spiffe-node-federation/tls.key") }}
{{- end }}
{{- $_ := set $c "federation" (dict "bundleEndpoint" $endpoint) }}
{{- end }}
{{- $up := $e.upstreamAuthority -}}
{{- if $up.disk.enabled -}}
{{- $disk := dict "certFile" "/run/spire/upstream_ca/tls.crt" "keyFile" "/run/spire/upstream_ca/tls.key" -}}
{{- with $up.disk.secret.bundleKey -}}
{{- $_ := set $disk "bundleFile" (printf "/run/spire/upstream_ca/%s" .) -}}
{{- end -}}
{{- $_ := set $c.embedded "upstream" (dict "disk" $disk) -}}
{{- else if $up.spire.enabled -}}
{{- $_ := set $c.embedded "upstream" (dict "parent" (dict
  "address" (printf "%s:%d" $up.spire.server.address (int $up.spire.server.port))
  "workloadAPISocket" "/run/spire/upstream_agent/spire-agent.sock")) -}}
{{- end -}}
{{- if $v.startupTaint.enabled }}
{{- $_ := set $c "startupTaint" (dict "key" $v.startupTaint.key "driver" $v.pluginName) }}
{{- end }}
{{- mergeOverwrite $c (deepCopy $e.config) | toYaml }}
{{- end }}

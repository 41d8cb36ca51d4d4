{{/* What a schema cannot say well. */}}
{{- define "spiffe-node.check" -}}
{{- $v := .Values -}}
{{- range list "spire-agent" "spire-server" "spiffe-csi-driver" "spiffe-oidc-discovery-provider" "upstream-spire-agent" "upstream-spiffe-csi-driver" "tornjak-frontend" }}
{{- if hasKey $v . }}
{{- fail (printf "values under %q are those of the chart \"spire\"; docs/kubernetes.md has the table of their names here" .) }}
{{- end }}
{{- end }}
{{- if not $v.global.spire.trustDomain }}
{{- fail "global.spire.trustDomain is missing: --set global.spire.trustDomain=example.org (with Istio: the same as meshConfig.trustDomain)" }}
{{- end }}
{{- if and (not (include "spiffe-node.embedded" .)) (not $v.authority.external.address) }}
{{- fail "authority.external.address is missing: host:port of the SPIRE Server" }}
{{- end }}
{{- if and (include "spiffe-node.embedded" .) $v.authority.external.address }}
{{- fail "authority.external.address is set, but authority.mode is embedded; set authority.mode=external to use that server" }}
{{- end }}
{{- if and (not (include "spiffe-node.embedded" .)) $v.startupTaint.enabled }}
{{- fail "startupTaint.enabled: it is the embedded authority that removes the taint; a SPIRE Server does not" }}
{{- end }}
{{- if and $v.startupTaint.enabled (not $v.startupTaint.key) }}
{{- fail "startupTaint.key is empty" }}
{{- end }}
{{- if not (or (hasPrefix "/run/" $v.stateDirectory) (hasPrefix "/var/run/" $v.stateDirectory)) }}
{{- fail (printf "stateDirectory %s is not below /run: restart state holds private keys and must be on a tmpfs" $v.stateDirectory) }}
{{- end }}
{{- if or (eq $v.socket.directory $v.stateDirectory) (hasPrefix (printf "%s/" $v.socket.directory) (printf "%s/" $v.stateDirectory)) }}
{{- fail (printf "stateDirectory %s lies in socket.directory, which every pod can read; choose another" $v.stateDirectory) }}
{{- end }}
{{- $f := $v.authority.embedded.federation }}
{{- if $f.enabled }}
{{- if not (include "spiffe-node.embedded" .) }}
{{- fail "authority.embedded.federation.enabled needs authority.mode=embedded; a SPIRE Server has its own bundle endpoint" }}
{{- end }}
{{- if eq (toString $f.tls.spire.enabled) (toString $f.tls.externalSecret.enabled) }}
{{- fail "authority.embedded.federation.tls: enable either spire or externalSecret" }}
{{- end }}
{{- if and $f.tls.externalSecret.enabled (not $f.tls.externalSecret.secretName) }}
{{- fail "authority.embedded.federation.tls.externalSecret.secretName is missing" }}
{{- end }}
{{- end }}
{{- if and $v.clusterFederatedTrustDomains (or (not (include "spiffe-node.embedded" .)) (not $v.registration.enabled)) }}
{{- fail "clusterFederatedTrustDomains needs authority.mode=embedded and registration.enabled: nobody else acts on them" }}
{{- end }}
{{- $up := $v.authority.embedded.upstreamAuthority }}
{{- if and $up.disk.enabled $up.spire.enabled }}
{{- fail "authority.embedded.upstreamAuthority: disk and spire are both enabled; there is one CA above" }}
{{- end }}
{{- if and $up.disk.enabled (not $up.disk.secret.name) }}
{{- fail "authority.embedded.upstreamAuthority.disk.secret.name is missing: the Secret with tls.crt and tls.key" }}
{{- end }}
{{- if and $up.spire.enabled (not (and $up.spire.server.address $up.spire.upstreamDriver)) }}
{{- fail "authority.embedded.upstreamAuthority.spire needs server.address, and upstreamDriver: the CSI driver of an agent of that server" }}
{{- end }}
{{- if and $up.spire.enabled (eq $up.spire.upstreamDriver $v.pluginName) }}
{{- fail "authority.embedded.upstreamAuthority.spire.upstreamDriver is this chart's own driver: the authority would ask itself" }}
{{- end }}
{{- $ru := $v.node.rollingUpdate }}
{{- if and (eq (toString $ru.maxSurge) "0") (eq (toString $ru.maxUnavailable) "0") }}
{{- fail "node.rollingUpdate: maxSurge and maxUnavailable are both 0; one of them must allow an update" }}
{{- end }}
{{- end }}

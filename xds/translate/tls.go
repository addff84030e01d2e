package translate

import (
	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	tlsv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/transport_sockets/tls/v3"
	matcherv3 "github.com/envoyproxy/go-control-plane/envoy/type/matcher/v3"
	"google.golang.org/protobuf/types/known/wrapperspb"

	"github.com/portolan-io/portolan/xds/model"
)

const tlsSocket = "envoy.transport_sockets.tls"

// callerTLS presents the proxy's identity and accepts exactly the callee's.
// Sessions are not resumed: a resumed one would not be checked again after a
// change of trust.
func callerTLS(sni string, identities []string) *corev3.TransportSocket {
	accept := &tlsv3.CertificateValidationContext{}
	for _, id := range identities {
		accept.MatchTypedSubjectAltNames = append(accept.MatchTypedSubjectAltNames, uri(exact(id)))
	}
	common := commonTLS()
	common.ValidationContextType = &tlsv3.CommonTlsContext_CombinedValidationContext{
		CombinedValidationContext: &tlsv3.CommonTlsContext_CombinedCertificateValidationContext{
			DefaultValidationContext: accept, ValidationContextSdsSecretConfig: sds(SecretTrust),
		},
	}
	return &corev3.TransportSocket{Name: tlsSocket, ConfigType: &corev3.TransportSocket_TypedConfig{TypedConfig: pack(&tlsv3.UpstreamTlsContext{
		CommonTlsContext: common, Sni: sni, MaxSessionKeys: wrapperspb.UInt32(0),
	})}}
}

// calleeTLS demands a certificate of an accepted peer.
func calleeTLS(alpn ...string) *corev3.TransportSocket {
	common := commonTLS()
	common.AlpnProtocols = alpn
	common.ValidationContextType = &tlsv3.CommonTlsContext_ValidationContextSdsSecretConfig{ValidationContextSdsSecretConfig: sds(SecretPeers)}
	return &corev3.TransportSocket{Name: tlsSocket, ConfigType: &corev3.TransportSocket_TypedConfig{TypedConfig: pack(&tlsv3.DownstreamTlsContext{
		CommonTlsContext: common, RequireClientCertificate: wrapperspb.Bool(true),
		DisableStatefulSessionResumption: true, SessionTicketKeysType: &tlsv3.DownstreamTlsContext_DisableStatelessSessionResumption{DisableStatelessSessionResumption: true},
	})}}
}

func commonTLS() *tlsv3.CommonTlsContext {
	return &tlsv3.CommonTlsContext{
		TlsParams: &tlsv3.TlsParameters{
			TlsMinimumProtocolVersion: tlsv3.TlsParameters_TLSv1_3, TlsMaximumProtocolVersion: tlsv3.TlsParameters_TLSv1_3,
		},
		TlsCertificateSdsSecretConfigs: []*tlsv3.SdsSecretConfig{sds(SecretIdentity)},
	}
}

func sds(name string) *tlsv3.SdsSecretConfig {
	return &tlsv3.SdsSecretConfig{Name: name, SdsConfig: ads()}
}

func uri(m *matcherv3.StringMatcher) *tlsv3.SubjectAltNameMatcher {
	return &tlsv3.SubjectAltNameMatcher{SanType: tlsv3.SubjectAltNameMatcher_URI, Matcher: m}
}

func exact(s string) *matcherv3.StringMatcher {
	return &matcherv3.StringMatcher{MatchPattern: &matcherv3.StringMatcher_Exact{Exact: s}}
}

func prefix(s string) *matcherv3.StringMatcher {
	return &matcherv3.StringMatcher{MatchPattern: &matcherv3.StringMatcher_Prefix{Prefix: s}}
}

// secrets of a graph: trust for callers, and trust with accepted peers for
// callees. Both are per domain (the SPIFFE validator), because one pool of roots
// would accept an identity of one domain that another domain signed.
type secrets struct {
	print print
	trust Resources // SecretTrust alone
	both  Resources
}

func (t *Translator) secrets() *secrets {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.trust != nil {
		return t.trust
	}
	s := &secrets{print: trustPrint(t.g), trust: empty(), both: empty()}
	if t.before.trust != nil && t.before.trust.print == s.print {
		t.trust = t.before.trust
		return t.trust
	}
	all := secret(SecretTrust, validator(t.g))
	s.trust.add(SecretType, SecretTrust, all)
	s.both[SecretType] = append(s.both[SecretType], s.trust[SecretType]...)
	peers := validator(t.g)
	peers.MatchTypedSubjectAltNames = append(peers.MatchTypedSubjectAltNames, uri(prefix("spiffe://"+t.g.TrustDomain+"/")))
	for _, id := range t.g.Peers {
		peers.MatchTypedSubjectAltNames = append(peers.MatchTypedSubjectAltNames, uri(exact(id)))
	}
	s.both.add(SecretType, SecretPeers, secret(SecretPeers, peers))
	t.trust = s
	return s
}

func validator(g *model.Graph) *tlsv3.CertificateValidationContext {
	config := &tlsv3.SPIFFECertValidatorConfig{}
	for _, d := range g.Domains {
		config.TrustDomains = append(config.TrustDomains, &tlsv3.SPIFFECertValidatorConfig_TrustDomain{
			Name: d.Name, TrustBundle: &corev3.DataSource{Specifier: &corev3.DataSource_InlineBytes{InlineBytes: d.Roots}},
		})
	}
	return &tlsv3.CertificateValidationContext{
		CustomValidatorConfig: &corev3.TypedExtensionConfig{Name: "envoy.tls.cert_validator.spiffe", TypedConfig: pack(config)},
	}
}

func secret(name string, v *tlsv3.CertificateValidationContext) *tlsv3.Secret {
	return &tlsv3.Secret{Name: name, Type: &tlsv3.Secret_ValidationContext{ValidationContext: v}}
}

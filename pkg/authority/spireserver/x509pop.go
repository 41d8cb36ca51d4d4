package spireserver

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"time"

	"github.com/spiffe/go-spiffe/v2/workloadapi"
)

// X509POP attests with a certificate and the proof that its key is here
// (x509pop). Files are read for each attestation, so that a renewed certificate
// is used; the key signs one challenge, together with a nonce of our own, and
// leaves the process in no other way.
type X509POP struct {
	CertificatePath   string // PEM, leaf first
	PrivateKeyPath    string // PEM
	IntermediatesPath string // PEM; "" = none beside those with the certificate
}

// X509POPWorkload is X509POP with an X.509-SVID of a Workload API, for a server
// whose x509pop is in mode spiffe: there the SVID's path begins with
// /spire-exchange/.
type X509POPWorkload struct {
	Socket string // path
}

// Type is x509pop.
func (X509POP) Type() string { return "x509pop" }

// Type is x509pop.
func (X509POPWorkload) Type() string { return "x509pop" }

// Prove shows the certificates in the files.
func (x X509POP) Prove(context.Context) (Proof, error) {
	certs, err := readSmall("certificate", x.CertificatePath)
	if err != nil {
		return Proof{}, err
	}
	keyPEM, err := readSmall("private key", x.PrivateKeyPath)
	if err != nil {
		return Proof{}, err
	}
	defer clear(keyPEM)
	pair, err := tls.X509KeyPair(certs, keyPEM)
	if err != nil {
		return Proof{}, fmt.Errorf("certificate %s with private key %s: %w", x.CertificatePath, x.PrivateKeyPath, err)
	}
	if x.IntermediatesPath != "" {
		more, err := readCertificates(x.IntermediatesPath)
		if err != nil {
			return Proof{}, err
		}
		pair.Certificate = append(pair.Certificate, more...)
	}
	leaf, err := x509.ParseCertificate(pair.Certificate[0])
	if err != nil {
		return Proof{}, fmt.Errorf("certificate %s: %w", x.CertificatePath, err)
	}
	if now := time.Now(); now.After(leaf.NotAfter) {
		return Proof{}, fmt.Errorf("certificate %s expired at %s; put a new one there", x.CertificatePath, leaf.NotAfter.Format(time.RFC3339))
	}
	return possession(pair.Certificate, pair.PrivateKey)
}

// readCertificates is the DER of all certificates in a PEM file.
func readCertificates(path string) ([][]byte, error) {
	data, err := readSmall("intermediates", path)
	if err != nil {
		return nil, err
	}
	var out [][]byte
	for {
		var block *pem.Block
		if block, data = pem.Decode(data); block == nil {
			break
		}
		if block.Type != "CERTIFICATE" {
			return nil, fmt.Errorf("intermediates %s: holds a PEM block of type %q; only CERTIFICATE belongs there", path, block.Type)
		}
		if _, err := x509.ParseCertificate(block.Bytes); err != nil {
			return nil, fmt.Errorf("intermediates %s: %w", path, err)
		}
		out = append(out, block.Bytes)
	}
	if len(out) == 0 {
		return nil, fmt.Errorf("intermediates %s: holds no certificate", path)
	}
	return out, nil
}

// Prove shows the SVID that the Workload API gives this process.
func (x X509POPWorkload) Prove(ctx context.Context) (Proof, error) {
	svid, err := workloadapi.FetchX509SVID(ctx, workloadapi.WithAddr("unix://"+x.Socket))
	if err != nil {
		return Proof{}, fmt.Errorf("X.509-SVID from the Workload API at %s: %w", x.Socket, err)
	}
	certs := make([][]byte, len(svid.Certificates))
	for i, c := range svid.Certificates {
		certs[i] = c.Raw
	}
	return possession(certs, svid.PrivateKey)
}

// The messages of x509pop. One of the two members of a challenge is null, and
// the answer has the same one.
type (
	popPayload struct {
		Certificates [][]byte `json:"certificates"`
	}
	popChallenge struct {
		RSA   *popNonce `json:"rsa_signature"`
		ECDSA *popNonce `json:"ecdsa_signature"`
	}
	popNonce struct {
		Nonce []byte `json:"nonce"`
	}
	popResponse struct {
		RSA   *popRSA   `json:"rsa_signature"`
		ECDSA *popECDSA `json:"ecdsa_signature"`
	}
	popRSA struct {
		Nonce     []byte `json:"nonce"`
		Signature []byte `json:"signature"`
	}
	popECDSA struct {
		Nonce []byte `json:"nonce"`
		R     []byte `json:"r"`
		S     []byte `json:"s"`
	}
)

// popNonceLen is the length of both nonces, bytes.
const popNonceLen = 32

// possession is the proof of a chain and its key. It answers one challenge.
func possession(chain [][]byte, key crypto.PrivateKey) (Proof, error) {
	switch key.(type) {
	case *rsa.PrivateKey, *ecdsa.PrivateKey:
	default:
		return Proof{}, fmt.Errorf("x509pop needs an RSA or ECDSA key, not %T", key)
	}
	payload, err := json.Marshal(popPayload{chain})
	if err != nil {
		return Proof{}, err
	}
	answered := false
	return Proof{Payload: payload, Respond: func(challenge []byte) ([]byte, error) {
		if answered {
			return nil, fmt.Errorf("%w: a second challenge in one attestation", errProtocol)
		}
		answered = true
		return popAnswer(key, challenge)
	}}, nil
}

// popAnswer signs a challenge: the nonce of the server is never signed but
// together with one of ours, so a server gets no signature of its choice.
func popAnswer(key crypto.PrivateKey, challenge []byte) ([]byte, error) {
	var in popChallenge
	if err := json.Unmarshal(challenge, &in); err != nil {
		return nil, fmt.Errorf("%w: malformed x509pop challenge", errProtocol)
	}
	own := make([]byte, popNonceLen)
	_, _ = rand.Read(own) // never fails
	var out popResponse
	switch key := key.(type) {
	case *rsa.PrivateKey:
		digest, err := popDigest(in.RSA, own)
		if err != nil {
			return nil, err
		}
		signature, err := rsa.SignPSS(rand.Reader, key, crypto.SHA256, digest, nil)
		if err != nil {
			return nil, err
		}
		out.RSA = &popRSA{own, signature}
	case *ecdsa.PrivateKey:
		digest, err := popDigest(in.ECDSA, own)
		if err != nil {
			return nil, err
		}
		r, s, err := ecdsa.Sign(rand.Reader, key, digest)
		if err != nil {
			return nil, err
		}
		out.ECDSA = &popECDSA{own, r.Bytes(), s.Bytes()}
	}
	return json.Marshal(out)
}

var errPopNonce = errors.New("the x509pop challenge has no nonce of 32 bytes for this kind of key")

func popDigest(theirs *popNonce, own []byte) ([]byte, error) {
	if theirs == nil || len(theirs.Nonce) != popNonceLen {
		return nil, fmt.Errorf("%w: %w", errProtocol, errPopNonce)
	}
	h := sha256.New()
	h.Write(theirs.Nonce)
	h.Write(own)
	return h.Sum(nil), nil
}

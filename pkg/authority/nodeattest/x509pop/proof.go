package x509pop

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"math/big"

	"github.com/spiffe-node/spiffe-node/pkg/authority/nodeattest"
)

const (
	// maxPayload bounds what is parsed, in bytes: five certificates of the
	// largest keys fit several times.
	maxPayload = 256 << 10
	// maxAnswer bounds the answer to a challenge, in bytes.
	maxAnswer = 16 << 10
	nonceSize = 32
)

// payload is what an agent sends: its leaf first, each as DER.
type payload struct {
	Certificates [][]byte `json:"certificates"`
}

// question is the challenge; the half for the other kind of key is null.
type question struct {
	RSA   *nonce `json:"rsa_signature"`
	ECDSA *nonce `json:"ecdsa_signature"`
}

type nonce struct {
	Nonce []byte `json:"nonce"`
}

// answer is what the agent makes of a challenge.
type answer struct {
	RSA *struct {
		Nonce     []byte `json:"nonce"`
		Signature []byte `json:"signature"`
	} `json:"rsa_signature"`
	ECDSA *struct {
		Nonce []byte `json:"nonce"`
		R     []byte `json:"r"`
		S     []byte `json:"s"`
	} `json:"ecdsa_signature"`
}

// chain is a payload that is within the limits and not verified yet.
type chain struct {
	leaf          *x509.Certificate
	intermediates []*x509.Certificate
}

func (a *Attestor) parse(data []byte) (*chain, error) {
	if len(data) > maxPayload {
		return nil, nodeattest.Invalid("attestation data of %d bytes is larger than %d", len(data), maxPayload)
	}
	var p payload
	if err := json.Unmarshal(data, &p); err != nil {
		return nil, nodeattest.Invalid("failed to unmarshal data: %v", err)
	}
	switch n := len(p.Certificates); {
	case n == 0:
		return nil, nodeattest.Invalid("no certificate to attest")
	case n-1 > a.cfg.MaxIntermediates:
		return nil, nodeattest.Invalid("too many intermediate certificates")
	}
	leaf, err := x509.ParseCertificate(p.Certificates[0])
	switch {
	case err != nil:
		return nil, nodeattest.Invalid("unable to parse leaf certificate: %v", err)
	case a.tooLarge(leaf):
		return nil, nodeattest.Invalid("leaf certificate key size too large")
	}
	out := &chain{leaf: leaf}
	for i, der := range p.Certificates[1:] {
		cert, err := x509.ParseCertificate(der)
		switch {
		case err != nil:
			return nil, nodeattest.Invalid("unable to parse intermediate certificate %d: %v", i, err)
		case a.tooLarge(cert):
			return nil, nodeattest.Invalid("intermediate certificate %d key size too large", i)
		}
		out.intermediates = append(out.intermediates, cert)
	}
	return out, nil
}

func (a *Attestor) tooLarge(cert *x509.Certificate) bool {
	key, ok := cert.PublicKey.(*rsa.PublicKey)
	return ok && key.N.BitLen() > a.cfg.MaxRSAKeySize
}

// prove has the agent sign a nonce of ours and one of its own.
func prove(leaf *x509.Certificate, challenge func([]byte) ([]byte, error)) error {
	ours := make([]byte, nonceSize)
	_, _ = rand.Read(ours) // never fails
	q, err := ask(leaf, ours)
	if err != nil {
		return fmt.Errorf("unable to generate challenge: %w", err)
	}
	out, err := json.Marshal(q)
	if err != nil {
		return fmt.Errorf("unable to marshal challenge: %w", err)
	}
	data, err := challenge(out)
	if err != nil {
		return err
	}
	if len(data) > maxAnswer {
		return nodeattest.Invalid("challenge response of %d bytes is larger than %d", len(data), maxAnswer)
	}
	var got answer
	if err := json.Unmarshal(data, &got); err != nil {
		return nodeattest.Invalid("unable to unmarshal challenge response: %v", err)
	}
	if err := check(leaf, ours, &got); err != nil {
		return nodeattest.Denied("challenge response verification failed: %v", err)
	}
	return nil
}

func ask(leaf *x509.Certificate, ours []byte) (*question, error) {
	if leaf.KeyUsage&x509.KeyUsageDigitalSignature == 0 {
		return nil, errors.New("certificate not intended for digital signature use")
	}
	switch key := leaf.PublicKey.(type) {
	case *rsa.PublicKey:
		return &question{RSA: &nonce{ours}}, nil
	case *ecdsa.PublicKey:
		return &question{ECDSA: &nonce{ours}}, nil
	default:
		return nil, fmt.Errorf("unsupported public key type %T", key)
	}
}

func check(leaf *x509.Certificate, ours []byte, got *answer) error {
	switch key := leaf.PublicKey.(type) {
	case *rsa.PublicKey:
		if got.RSA == nil {
			return errors.New("expecting RSA response")
		}
		digest, err := digestOf(ours, got.RSA.Nonce)
		if err != nil {
			return err
		}
		if rsa.VerifyPSS(key, crypto.SHA256, digest, got.RSA.Signature, nil) != nil {
			return errors.New("RSA signature verify failed")
		}
		return nil
	case *ecdsa.PublicKey:
		if got.ECDSA == nil {
			return errors.New("expecting ECDSA response")
		}
		digest, err := digestOf(ours, got.ECDSA.Nonce)
		if err != nil {
			return err
		}
		r, s := new(big.Int).SetBytes(got.ECDSA.R), new(big.Int).SetBytes(got.ECDSA.S)
		if !ecdsa.Verify(key, digest, r, s) {
			return errors.New("ECDSA signature verify failed")
		}
		return nil
	}
	return errors.New("unsupported public key type") // ask refused it
}

func digestOf(ours, theirs []byte) ([]byte, error) {
	if len(theirs) != nonceSize {
		return nil, errors.New("invalid response nonce")
	}
	sum := sha256.Sum256(append(append([]byte{}, ours...), theirs...))
	return sum[:], nil
}

package svid

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"fmt"
)

// Key types of X.509-SVIDs, as the configuration spells them.
const (
	KeyECP256  = "ec-p256"
	KeyECP384  = "ec-p384"
	KeyRSA2048 = "rsa-2048"
)

// rsaAhead is how many RSA keys are made in advance: one costs 50 to 300 ms,
// an EC key 20 us.
const rsaAhead = 8

// keyMaker makes private keys. Safe for concurrent use.
type keyMaker struct {
	kind  string
	ahead chan crypto.Signer // RSA only
}

func newKeyMaker(kind string) *keyMaker {
	k := &keyMaker{kind: kind}
	if kind == KeyRSA2048 {
		k.ahead = make(chan crypto.Signer, rsaAhead)
	}
	return k
}

// run keeps RSA keys in stock until ctx ends; one at a time, so that it never
// takes more than one CPU.
func (k *keyMaker) run(ctx context.Context) {
	if k.ahead == nil {
		return
	}
	for ctx.Err() == nil {
		key, err := rsa.GenerateKey(rand.Reader, 2048)
		if err != nil {
			return // make reports it
		}
		select {
		case k.ahead <- key:
		case <-ctx.Done():
		}
	}
}

// make is a new key, from stock where there is one.
func (k *keyMaker) make() (crypto.Signer, error) {
	var key crypto.Signer
	var err error
	switch k.kind {
	case KeyECP384:
		key, err = ecdsa.GenerateKey(elliptic.P384(), rand.Reader)
	case KeyRSA2048:
		select {
		case key = <-k.ahead:
		default:
			key, err = rsa.GenerateKey(rand.Reader, 2048)
		}
	default:
		key, err = ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	}
	if err != nil {
		return nil, fmt.Errorf("make %s key: %w", k.kind, err)
	}
	return key, nil
}

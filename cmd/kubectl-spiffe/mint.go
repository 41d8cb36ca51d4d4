package main

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"net/url"
	"os"
	"path/filepath"
	"time"

	"github.com/spf13/cobra"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc"

	"github.com/spiffe-node/spiffe-node/internal/spirewire/bundlepb"
	"github.com/spiffe-node/spiffe-node/internal/spirewire/svidpb"
)

func (a *app) x509Command() *cobra.Command {
	return group("x509", "Mint X509-SVIDs", a.x509MintCommand())
}

func (a *app) jwtCommand() *cobra.Command {
	return group("jwt", "Mint JWT-SVIDs", a.jwtMintCommand())
}

// minted is an X509-SVID with its key, which was made here and has not been
// anywhere else.
type minted struct {
	X509SVID   [][]byte `json:"x509_svid"`
	PrivateKey []byte   `json:"private_key"`
	RootCAs    [][]byte `json:"root_cas"`
}

func (a *app) x509MintCommand() *cobra.Command {
	var id, dir string
	var dns []string
	var ttl time.Duration
	cmd := command("mint", "Mints an X509-SVID", func(ctx context.Context) error {
		if id == "" {
			return errors.New("spiffeID must be specified")
		}
		parsed, err := spiffeid.FromString(id)
		if err != nil {
			return err
		}
		seconds, err := ttlSeconds(ttl)
		if err != nil {
			return err
		}
		return a.connect(func(conn grpc.ClientConnInterface) error {
			svid, err := mintX509(ctx, conn, parsed, dns, seconds)
			if err != nil {
				return err
			}
			leaf, err := x509.ParseCertificate(svid.X509SVID[0])
			if err != nil {
				return fmt.Errorf("the server sent a certificate that cannot be read: %w", err)
			}
			a.noteCapped("X509-SVID", leaf.NotAfter, ttl)
			if dir != "" {
				return a.writeMinted(svid, dir)
			}
			return a.print(answer{value: svid, pretty: func() error {
				fmt.Fprintf(a.stdout, "X509-SVID:\n%s\nPrivate key:\n%s\nRoot CAs:\n%s\n",
					pemText("CERTIFICATE", svid.X509SVID...), pemText("PRIVATE KEY", svid.PrivateKey), pemText("CERTIFICATE", svid.RootCAs...))
				return nil
			}})
		})
	})
	cmd.Flags().StringVar(&id, "spiffeID", "", "SPIFFE ID of the X509-SVID")
	cmd.Flags().StringArrayVar(&dns, "dns", nil, "DNS name that will be included in SVID. Can be used more than once.")
	cmd.Flags().DurationVar(&ttl, "ttl", 0, "TTL of the X509-SVID")
	cmd.Flags().StringVar(&dir, "write", "", "Directory to write output to instead of stdout")
	return cmd
}

func mintX509(ctx context.Context, conn grpc.ClientConnInterface, id spiffeid.ID, dns []string, ttl int32) (*minted, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, fmt.Errorf("unable to generate key: %w", err)
	}
	csr, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{URIs: []*url.URL{id.URL()}, DNSNames: dns}, key)
	if err != nil {
		return nil, fmt.Errorf("unable to generate CSR: %w", err)
	}
	resp, err := svidpb.NewSVIDClient(conn).MintX509SVID(ctx, &svidpb.MintX509SVIDRequest{Csr: csr, Ttl: ttl})
	if err != nil {
		return nil, fmt.Errorf("unable to mint SVID: %w", err)
	}
	if len(resp.GetSvid().GetCertChain()) == 0 {
		return nil, errors.New("server response missing SVID chain")
	}
	bundle, err := bundlepb.NewBundleClient(conn).GetBundle(ctx, &bundlepb.GetBundleRequest{})
	if err != nil {
		return nil, fmt.Errorf("unable to get bundle: %w", err)
	}
	out := &minted{X509SVID: resp.GetSvid().GetCertChain()}
	if out.PrivateKey, err = x509.MarshalPKCS8PrivateKey(key); err != nil {
		return nil, err
	}
	for _, c := range bundle.GetX509Authorities() {
		out.RootCAs = append(out.RootCAs, c.GetAsn1())
	}
	if len(out.RootCAs) == 0 {
		return nil, errors.New("server response missing root CAs")
	}
	return out, nil
}

// ttlSeconds rounds up to what the wire can say.
func ttlSeconds(ttl time.Duration) (int32, error) {
	s := int64((ttl + time.Second - 1) / time.Second)
	if ttl < 0 {
		return 0, fmt.Errorf("a TTL of %s is in the past", ttl)
	}
	return toInt32(s, "TTL")
}

// noteCapped says when an SVID ends before the time asked for.
func (a *app) noteCapped(what string, end time.Time, ttl time.Duration) {
	if ttl > 0 && time.Until(end) < ttl {
		fmt.Fprintf(a.stderr, "%s lifetime was capped shorter than specified ttl; expires %q\n", what, end.UTC().Format(time.RFC3339))
	}
}

func pemText(kind string, ders ...[]byte) []byte {
	var out []byte
	for _, der := range ders {
		out = append(out, pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der})...)
	}
	return out
}

func (a *app) writeMinted(svid *minted, dir string) error {
	for _, f := range []struct {
		name, what, problem string
		data                []byte
		mode                os.FileMode
	}{
		{"svid.pem", "X509-SVID", "SVID", pemText("CERTIFICATE", svid.X509SVID...), 0o644},
		{"key.pem", "Private key", "key", pemText("PRIVATE KEY", svid.PrivateKey), 0o600},
		{"bundle.pem", "Root CAs", "bundle", pemText("CERTIFICATE", svid.RootCAs...), 0o644},
	} {
		path := filepath.Join(dir, f.name)
		if err := writeFile(path, f.data, f.mode); err != nil {
			return fmt.Errorf("unable to write %s: %w", f.problem, err)
		}
		fmt.Fprintf(a.stdout, "%s written to %s\n", f.what, path)
	}
	return nil
}

// writeFile gives a file its mode even if it was there before with another:
// keys and tokens must not end up in a file that others can read.
func writeFile(path string, data []byte, mode os.FileMode) error {
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_TRUNC, mode)
	if err != nil {
		return err
	}
	err = f.Chmod(mode)
	if err == nil {
		_, err = f.Write(data)
	}
	return errors.Join(err, f.Close())
}

func (a *app) jwtMintCommand() *cobra.Command {
	var id, path string
	var audience []string
	var ttl time.Duration
	cmd := command("mint", "Mints a JWT-SVID", func(ctx context.Context) error {
		switch {
		case id == "":
			return errors.New("spiffeID must be specified")
		case len(audience) == 0:
			return errors.New("at least one audience must be specified")
		}
		parsed, err := spiffeid.FromString(id)
		if err != nil {
			return err
		}
		seconds, err := ttlSeconds(ttl)
		if err != nil {
			return err
		}
		return a.connect(func(conn grpc.ClientConnInterface) error {
			resp, err := svidpb.NewSVIDClient(conn).MintJWTSVID(ctx, &svidpb.MintJWTSVIDRequest{
				Id: idToWire(parsed), Audience: audience, Ttl: seconds,
			})
			if err != nil {
				return fmt.Errorf("unable to mint SVID: %w", err)
			}
			token := resp.GetSvid().GetToken()
			if token == "" {
				return errors.New("server response missing token")
			}
			a.noteCapped("JWT-SVID", time.Unix(resp.GetSvid().GetExpiresAt(), 0), ttl)
			if path != "" {
				if err := writeFile(path, []byte(token), 0o600); err != nil {
					return fmt.Errorf("unable to write token: %w", err)
				}
				fmt.Fprintf(a.stdout, "JWT-SVID written to %s\n", path)
				return nil
			}
			return a.print(answer{message: resp, pretty: func() error {
				fmt.Fprintln(a.stdout, token)
				return nil
			}})
		})
	})
	cmd.Flags().StringVar(&id, "spiffeID", "", "SPIFFE ID of the JWT-SVID")
	cmd.Flags().StringArrayVar(&audience, "audience", nil, "Audience claim that will be included in the SVID. Can be used more than once.")
	cmd.Flags().DurationVar(&ttl, "ttl", 0, "TTL of the JWT-SVID")
	cmd.Flags().StringVar(&path, "write", "", "File to write token to instead of stdout")
	return cmd
}

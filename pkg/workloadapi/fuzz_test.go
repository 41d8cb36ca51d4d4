package workloadapi_test

import (
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	"github.com/spiffe-node/spiffe-node/pkg/workloadapi"
)

// FuzzHeader: nothing but the one value, once, opens the door.
func FuzzHeader(f *testing.F) {
	f.Add("workload.spiffe.io", "true", 1)
	f.Add("workload.spiffe.io", "true", 2)
	f.Add("Workload.Spiffe.IO", "true", 1)
	f.Add("workload.spiffe.io", "TRUE ", 1)
	f.Add("workload.spiffe.io\x00", "", 0)
	f.Fuzz(func(t *testing.T, key, value string, n int) {
		md := metadata.MD{}
		for range min(max(n, 0), 8) {
			md.Append(key, value)
		}
		want := strings.ToLower(key) == "workload.spiffe.io" && value == "true" && n == 1
		if got := workloadapi.CheckHeader(md) == nil; got != want {
			t.Errorf("%q: %q %d times: %v", key, value, n, got)
		}
	})
}

// FuzzJWTRequest: bytes of a FetchJWTSVID request are refused or sound.
func FuzzJWTRequest(f *testing.F) {
	for _, q := range []*workload.JWTSVIDRequest{
		{}, {Audience: []string{"a", "b"}}, {Audience: []string{""}}, {Audience: []string{"a"}, SpiffeId: "spiffe://td/x"}, {Audience: []string{"a"}, SpiffeId: "x"},
	} {
		b, _ := proto.Marshal(q)
		f.Add(b)
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		var q workload.JWTSVIDRequest
		if proto.Unmarshal(b, &q) != nil {
			return
		}
		err := workloadapi.CheckJWTRequest(&q)
		switch {
		case err == nil && (len(q.GetAudience()) == 0 || slices.Contains(q.GetAudience(), "")):
			t.Error("accepted without audience")
		case err != nil && status.Code(err) != codes.InvalidArgument:
			t.Error(err)
		}
	})
}

// FuzzToken: no text but the one that was signed is a valid token.
func FuzzToken(f *testing.F) {
	w := newWorld(f)
	good := w.own.token(f, map[string]any{"sub": "spiffe://example.org/x", "aud": "a", "exp": time.Now().Add(time.Hour).Unix()})
	for _, s := range []string{good, "", "a.b.c", good + "=", good[:len(good)-2], strings.ToUpper(good), strings.Replace(good, ".", "..", 1), "eyJhbGciOiJub25lIn0.e30."} {
		f.Add(s)
	}
	l := newLayer(nil)
	srv, err := workloadapi.New(workloadapi.Config{Subscribe: l.subscribe, JWT: l.issue})
	if err != nil {
		f.Fatal(err)
	}
	u := w.federated(w.has(w.web))
	f.Fuzz(func(t *testing.T, token string) {
		r, err := srv.Validate(u, token, "a")
		if err != nil {
			if status.Code(err) != codes.InvalidArgument {
				t.Error(err)
			}
			return
		}
		// The last base64 digit has spare bits; the signed part must be ours.
		if signed := good[:strings.LastIndex(good, ".")]; !strings.HasPrefix(strings.TrimSpace(token), signed+".") || r.GetSpiffeId() != "spiffe://example.org/x" {
			t.Errorf("accepted %q as %v", token, r)
		}
	})
}

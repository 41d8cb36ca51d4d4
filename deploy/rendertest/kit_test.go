package rendertest_test

import (
	"bytes"
	"encoding/json"
	"testing"

	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/client-go/util/jsonpath"
)

func nested(o map[string]any, path ...string) (string, bool, error) {
	return unstructured.NestedString(o, path...)
}

// jsonPath is what kubectl get -o jsonpath prints of a list.
func jsonPath(t *testing.T, expr, file string) string {
	t.Helper()
	var data any
	if err := json.Unmarshal([]byte(readFile(t, file)), &data); err != nil {
		t.Fatal(err)
	}
	p := jsonpath.New("test").AllowMissingKeys(true)
	if err := p.Parse(expr); err != nil {
		t.Fatal(err)
	}
	var out bytes.Buffer
	if err := p.Execute(&out, data); err != nil {
		t.Fatal(err)
	}
	return out.String()
}

package cluster

import (
	"context"
	"encoding/json"
	"fmt"
	"net"
	"net/netip"
	"strings"
	"time"

	"golang.org/x/net/dns/dnsmessage"
)

// clusterDNS is where pods ask; clusterDomain is what service names end in.
const (
	clusterDNS    = "10.96.0.10"
	clusterDomain = ".svc.cluster.local."
)

// serveDNS answers A queries for services and for the pods of headless ones,
// asking the API server each time. Everything else does not exist: nothing
// beyond this machine can be resolved.
func (s *supervisor) serveDNS() error {
	conn, err := net.ListenPacket("udp4", clusterDNS+":53")
	if err != nil {
		return fmt.Errorf("listening for DNS queries: %w", err)
	}
	go func() {
		buf := make([]byte, 1500)
		for {
			n, from, err := conn.ReadFrom(buf)
			if err != nil {
				return
			}
			query := append([]byte(nil), buf[:n]...)
			go func() {
				ctx, cancel := context.WithTimeout(context.Background(), 2*time.Second)
				defer cancel()
				if answer, err := s.answer(ctx, query); err == nil {
					_, _ = conn.WriteTo(answer, from)
				}
			}()
		}
	}()
	return nil
}

func (s *supervisor) answer(ctx context.Context, query []byte) ([]byte, error) {
	var p dnsmessage.Parser
	head, err := p.Start(query)
	if err != nil {
		return nil, err
	}
	q, err := p.Question()
	if err != nil {
		return nil, err
	}
	addrs, err := s.resolve(ctx, strings.ToLower(q.Name.String()))
	res := dnsmessage.Header{ID: head.ID, Response: true, Authoritative: true, RecursionDesired: head.RecursionDesired, RecursionAvailable: true}
	switch {
	case err != nil:
		res.RCode = dnsmessage.RCodeServerFailure
	case len(addrs) == 0:
		res.RCode = dnsmessage.RCodeNameError
	}
	b := dnsmessage.NewBuilder(nil, res)
	if err := b.StartQuestions(); err != nil {
		return nil, err
	}
	if err := b.Question(q); err != nil {
		return nil, err
	}
	if err := b.StartAnswers(); err != nil {
		return nil, err
	}
	if q.Type == dnsmessage.TypeA {
		for _, a := range addrs {
			h := dnsmessage.ResourceHeader{Name: q.Name, Class: dnsmessage.ClassINET, TTL: 1}
			if err := b.AResource(h, dnsmessage.AResource{A: a.As4()}); err != nil {
				return nil, err
			}
		}
	}
	return b.Finish()
}

// resolve finds SERVICE.NAMESPACE or HOST.SERVICE.NAMESPACE, followed by the
// cluster's domain; an unknown name has no addresses.
func (s *supervisor) resolve(ctx context.Context, name string) ([]netip.Addr, error) {
	name, ok := strings.CutSuffix(name, clusterDomain)
	labels := strings.Split(name, ".")
	if !ok || len(labels) < 2 || len(labels) > 3 {
		return nil, nil
	}
	host, service, namespace := "", labels[len(labels)-2], labels[len(labels)-1]
	if len(labels) == 3 {
		host = labels[0]
	}
	var svc struct {
		Spec struct{ ClusterIP string }
	}
	body, err := s.get(ctx, "/api/v1/namespaces/"+namespace+"/services/"+service)
	if err != nil {
		return nil, nil //nolint:nilerr // most queries are for search suffixes that name no service
	}
	if err := json.Unmarshal(body, &svc); err != nil {
		return nil, err
	}
	if ip, err := netip.ParseAddr(svc.Spec.ClusterIP); err == nil && host == "" {
		return []netip.Addr{ip}, nil
	}
	var slices struct {
		Items []struct {
			Endpoints []struct {
				Addresses  []netip.Addr
				Hostname   string
				TargetRef  struct{ Name string }
				Conditions struct{ Ready *bool }
			}
		}
	}
	body, err = s.get(ctx, "/apis/discovery.k8s.io/v1/namespaces/"+namespace+"/endpointslices?labelSelector="+queryEscape("kubernetes.io/service-name="+service))
	if err != nil {
		return nil, err
	}
	if err := json.Unmarshal(body, &slices); err != nil {
		return nil, err
	}
	var addrs []netip.Addr
	for _, slice := range slices.Items {
		for _, e := range slice.Endpoints {
			if e.Conditions.Ready != nil && !*e.Conditions.Ready || host != "" && host != e.Hostname && host != e.TargetRef.Name {
				continue
			}
			for _, a := range e.Addresses {
				if a.Is4() {
					addrs = append(addrs, a)
				}
			}
		}
	}
	return addrs, nil
}

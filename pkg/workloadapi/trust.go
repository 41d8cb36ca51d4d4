package workloadapi

// TrustStatus is how far one open call is with the own trust bundle. The
// Workload API has no acknowledgement: what has been taken off our hands by the
// client's connection counts.
type TrustStatus struct {
	// Peer is what Config.PeerID said.
	Peer   uint64
	Method string
	// JWT says that the call is about JWT authorities, not X.509 ones.
	JWT bool
	// Sent is the generation of authorities in the last response; see
	// svid.Update.
	Sent uint32
}

// Trust visits the open calls that have been sent the own bundle. It never
// waits for a client.
func (s *Server) Trust(visit func(TrustStatus)) {
	s.mu.Lock()
	open := make([]*flow, 0, len(s.open))
	for f := range s.open {
		open = append(open, f)
	}
	s.mu.Unlock()
	for _, f := range open {
		f.mu.Lock()
		st := TrustStatus{Peer: f.peer, Method: f.method, JWT: f.method == "FetchJWTBundles", Sent: f.trust}
		f.mu.Unlock()
		if st.Sent != 0 {
			visit(st)
		}
	}
}

package csi

// ParseTarget takes a target path apart.
func ParseTarget(roots []string, target string) (path, uid, name string, err error) {
	t, err := parseTarget(roots, target)
	if err != nil {
		return "", "", "", err
	}
	return t.path(), t.uid, t.name, nil
}

// PathOf is the name of a socket.
func PathOf(s *Socket) string { return s.path }

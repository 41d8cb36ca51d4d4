package main

// The images hold no file but the programs. Where the system has no roots of
// the web's PKI, by which https_web endpoints and ACME servers are known, these
// are used; SSL_CERT_FILE and SSL_CERT_DIR name others.
import _ "golang.org/x/crypto/x509roots/fallback"

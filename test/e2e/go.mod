module github.com/spiffe-node/spiffe-node/test/e2e

go 1.26.0

replace github.com/spiffe-node/spiffe-node => ../..

package main

import "strings"

// driverName is the driver's usual name. A second trust domain on a cluster has
// a driver of another name that ends like it, such as b.csi.spiffe.io.
const driverName = "csi.spiffe.io"

func isDriver(name string) bool {
	return name == driverName || strings.HasSuffix(name, "."+driverName)
}

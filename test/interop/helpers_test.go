package interop_test

import (
	"os"
	"strconv"
)

func gid() string { return strconv.Itoa(os.Getgid()) }
func pid() string { return strconv.Itoa(os.Getpid()) }

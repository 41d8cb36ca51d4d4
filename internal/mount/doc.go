// Package mount binds one directory onto others and takes the binds away
// again, with system calls only.
//
// # Promise
//
// Every operation goes through descriptors: the parent of a target is walked
// once, without following a symbolic link below the trusted root, and the
// directory it led to is the one that is made, mounted on, unmounted and
// removed. The cost of an operation does not depend on the number of mounts on
// the host: whether a target is a mount, and of what, is asked of the kernel
// for this path alone (statx). The mount table is read by [ReadTable] only,
// which is for start-up and for the rare target nothing else explains.
//
// # Threats
//
// Somebody who can write below the root plants a symbolic link or swaps a
// directory between two steps, to have a mount made, or something removed,
// elsewhere. A source directory is deleted and made anew, so that a mount that
// looks right leads nowhere. Mounts are stacked on one target by an earlier
// program, so that one unmount uncovers the next.
package mount

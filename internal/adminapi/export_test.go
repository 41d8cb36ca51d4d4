package adminapi

import "google.golang.org/protobuf/proto"

// Page is readPage and page.next for tests.
func Page(size int32, token string, n int, last int64) (after int64, next string, err error) {
	p, err := readPage(size, token)
	return p.after, p.next(n, last), err
}

// Cut is one page of the numbers.
func Cut(size int32, token string, rows []int64) (items []int64, next string, err error) {
	p, err := readPage(size, token)
	if err != nil {
		return nil, "", err
	}
	items, last := cut(p, rows, func(r int64) int64 { return r })
	return items, p.next(len(items), last), nil
}

// ApplyMask clears fields of msg as the mask says.
func ApplyMask[M interface {
	comparable
	proto.Message
}](mask M, msg proto.Message,
) {
	newMasker(mask).apply(msg)
}

package adminapi

import (
	"fmt"
	"strconv"
)

// page is one step through a listing in row order. Tokens are the row of the
// last item handed out, so they survive restarts and changes in between.
type page struct {
	size  int // 0 = everything
	after int64
}

// readPage reads the paging fields. Without a size the token does not count.
func readPage(size int32, token string) (page, error) {
	if size <= 0 {
		return page{}, nil
	}
	p := page{size: int(size)}
	if token != "" {
		row, err := strconv.ParseUint(token, 10, 63)
		if err != nil {
			return page{}, fmt.Errorf("could not parse token '%s'", token)
		}
		p.after = int64(row) // 63 bits
	}
	return p, nil
}

// next is the token after a page of n items, the last of them in this row. It
// is empty only after an empty page: clients stop there and not before.
func (p page) next(n int, last int64) string {
	if p.size == 0 || n == 0 {
		return ""
	}
	return strconv.FormatInt(last, 10)
}

// cut is the page of a list in row order, and the row of its last item.
func cut[T any](p page, list []T, row func(T) int64) (items []T, last int64) {
	for _, v := range list {
		if row(v) <= p.after {
			continue
		}
		items, last = append(items, v), row(v)
		if p.size > 0 && len(items) == p.size {
			break
		}
	}
	return items, last
}

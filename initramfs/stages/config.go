package stages

import (
	"errors"
	"fmt"
	"strings"
)

// vmID returns the value of vm_id in a kernel command line. The line is measured
// and ours, but its parts could be read in two ways; such a line is refused.
func vmID(cmdline string) (string, error) {
	var ids []string
	for _, word := range strings.Fields(cmdline) {
		name, value, _ := strings.Cut(strings.Trim(word, `"`), "=")
		if strings.ReplaceAll(name, "-", "_") == "vm_id" {
			ids = append(ids, value)
		}
	}
	switch len(ids) {
	case 0:
		return "", errors.New("vm_id is missing")
	case 1:
		return ids[0], nil
	}
	return "", fmt.Errorf("vm_id stands %d times", len(ids))
}

package config

import (
	"encoding/json"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"coffer/internal/guestconfig"
)

// profileNone asks for no profile where one would be chosen.
const profileNone = "none"

// profiles are the kinds of workloads that need more than a container. They are
// data: the agent knows none of them by name.
func profiles() map[string]guestconfig.Profile {
	return map[string]guestconfig.Profile{
		profileNone: {},
		// NVFlare's sub_start.sh ends at once, with exit code 0, where the pid
		// file of a run that was killed names a live process, and in a container
		// it always does. It ignores SIGTERM and looks for shutdown.fl every few
		// seconds. A site ends with code 0 when its federation fails, too.
		"nvflare": {
			Name:     "nvflare",
			Remove:   []string{"workspace/*/daemon_pid.fl", "workspace/*/pid.fl", "workspace/*/restart.fl"},
			Writable: []string{"/opt/certs"}, Certs: "/opt/certs",
			StopFile: "workspace/nvflare/shutdown.fl", StopSeconds: 20,
			Lasting: true,
		},
	}
}

// ProfileNames lists the profiles, sorted.
func ProfileNames() []string { return slices.Sorted(maps.Keys(profiles())) }

// WorkloadProfile is the profile that the configuration names, else the one that
// fits what it puts into user_config.
func (c *Config) WorkloadProfile() guestconfig.Profile {
	name := c.Profile
	if name == "" {
		name = profileNone
		if c.runsNVFlare() {
			name = "nvflare"
		}
	}
	return profiles()[name]
}

// runsNVFlare recognises NVFlare by its authorizer or by its startup kit.
func (c *Config) runsNVFlare() bool {
	if slices.ContainsFunc(c.Issuers, func(i Issuer) bool { return strings.HasPrefix(i.Path, "nvflare.") }) {
		return true
	}
	for _, dir := range c.UserConfig {
		for _, name := range []string{"fed_server.json", "fed_client.json"} {
			b, err := os.ReadFile(filepath.Join(dir, "startup", name))
			if err == nil && json.Valid(b) {
				return true
			}
		}
	}
	return false
}

package envoy

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"syscall"

	"github.com/weftmesh/weft/api/names"
)

// Names within the run folder, which the supervisors and agents of a node share.
const (
	// AgentSocket is the agent's ADS and SDS for every Envoy of the node.
	AgentSocket = "agent.sock"
	// supervisorSocket, in a generation's folder, tells the agent Envoy's State.
	supervisorSocket = "supervisor.sock"
	// envoyDirectory, in a generation's folder, is Envoy's own.
	envoyDirectory = "envoy"
	adminSocket    = "admin.sock"
)

// folderOf is the folder of a generation within the run folder.
func folderOf(runDir string, generation uint32) string {
	return filepath.Join(runDir, "generation-"+strconv.FormatUint(uint64(generation), 10))
}

func (s *Supervisor) folder() string        { return folderOf(s.config.RunDir, s.generation) }
func (s *Supervisor) envoyFolder() string   { return filepath.Join(s.folder(), envoyDirectory) }
func (s *Supervisor) bootstrapFile() string { return filepath.Join(s.folder(), "envoy.json") }

// podFile in a generation's folder names the pod of its supervisor: one that was killed comes back to it.
const podFile = "pod"

// before is the generation that a supervisor of this pod had which did not end by itself; else the first.
func (s *Supervisor) before() uint32 {
	for generation := range uint32(names.Generations) {
		text, err := os.ReadFile(filepath.Join(folderOf(s.config.RunDir, generation), podFile))
		if err == nil && string(text) == s.config.PodUID {
			return generation
		}
	}
	return 0
}

// makeFolders makes the run folder, the generation's own, and the one in which Envoy makes its admin socket: nothing else is
// writable for it.
func (s *Supervisor) makeFolders() error {
	c := s.config
	if err := makeFolder(s.folder(), 0, c.GID); err != nil {
		return err
	}
	if err := os.WriteFile(filepath.Join(s.folder(), podFile), []byte(c.PodUID), 0o600); err != nil {
		return fmt.Errorf("note whose generation it is: %w", err)
	}
	// The admin socket is for Envoy's group, and root without CAP_DAC_OVERRIDE is like anybody.
	if err := syscall.Setgroups([]int{c.GID}); err != nil {
		return fmt.Errorf("join Envoy's group: %w", err)
	}
	return makeFolder(s.envoyFolder(), c.UID, c.GID)
}

// clear leaves nothing of the generation in the run folder, which other containers share, nor of another that nobody has.
func (s *Supervisor) clear() {
	err := errors.Join(removeFolder(s.folder()), Clear(s.config.RunDir))
	if err != nil {
		s.config.Log.Warn("the run folder is not cleared", "error", err)
	}
}

// Clear removes the folders of generations from the run folder whose supervisors were killed and did not come back.
func Clear(runDir string) error {
	var err error
	for generation, lock := range locks(runDir) {
		free, failed := TryLock(lock)
		if free != nil {
			failed = removeFolder(folderOf(runDir, uint32(generation)))
			free()
		}
		err = errors.Join(err, failed)
	}
	return err
}

// removeFolder removes a generation's folder. What Envoy owns becomes its own first, as in makeFolder.
func removeFolder(path string) error {
	if err := os.Chown(filepath.Join(path, envoyDirectory), 0, 0); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return os.RemoveAll(path)
}

// makeFolder makes a folder that its owner and Envoy's group alone may enter; kubelet makes the run folder open to all.
func makeFolder(path string, uid, gid int) error {
	if err := os.MkdirAll(path, 0o750); err != nil {
		return fmt.Errorf("make folder for sockets: %w", err)
	}
	// The supervisor may change owners but not other owners' modes: one that Envoy owns since before becomes its own first.
	if err := os.Chown(path, 0, gid); err != nil {
		return fmt.Errorf("take folder for sockets: %w", err)
	}
	if err := os.Chmod(path, 0o750); err != nil {
		return fmt.Errorf("close folder for sockets: %w", err)
	}
	if err := os.Chown(path, uid, gid); err != nil {
		return fmt.Errorf("give folder for sockets to Envoy's group: %w", err)
	}
	return nil
}

// NextFile ends the name of a file that ReplaceFile has not written to its end.
const NextFile = ".next"

// ReplaceFile writes a file of the run folder for its owner alone: who reads it finds the old text or the new.
func ReplaceFile(path string, text []byte) error {
	if err := os.WriteFile(path+NextFile, text, 0o600); err != nil {
		return err
	}
	return os.Rename(path+NextFile, path)
}

// Package kernels runs compiled tests on other kernels than this machine's: it fetches Debian's, boots each under qemu
// with nothing but the tests and the control groups of version 2, and reads back what they say.
//
// A machine is one kernel, an initramfs made here and 2 GB of memory; it has no disk and no network. Its process 1 is
// the program in ./init, which loads the modules, mounts the file systems, runs the plan and powers off. The first
// serial port is the kernel's console, the second carries the tests' output.
package kernels

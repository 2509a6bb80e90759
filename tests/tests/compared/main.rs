//! The same specification under runc and under husk, seen from inside by the same program, line by line. What differs fails,
//! unless a test's table names the row of docs/differences.md that it belongs to.
//!
//! Four groups are compared in every run, under both versions of containerd; the others in `make test-long`.
//!
//! Each specification is an edit of one base. runc is forky's 1.3: trixie's 1.1 ignores half of the fields.

mod compare;
mod devices;
mod mounts;
mod namespaces;
mod process;
mod resources;
mod seccomp;

//! Templates: microVMs that were booted once, stopped when their agent was ready, and written down,
//! for pods to start from as clones. `docs/decisions/0007-templates.md` says why it is done so.
//!
//! ```text
//! key          what a template depends on, and its name
//! size         what a template has, so that pods of other sizes can start from it
//! manifest     template.json: what it was made of, and what its files must look like
//! store        /var/lib/husk/templates: found, checked and opened; published; removed
//! draft        a template in the making, and the lock on that
//! gc           what is left over, outdated, or more than the space allows
//! build        boots, prepares, saves, tries, publishes
//! pages        which pages every start touches
//! background   the build that a cold start asks for
//! command      husk template build|ls|rm|gc
//! ```
//!
//! A pod never waits for a template and never fails for one: whatever is wrong with it, the pod boots.

pub mod background;
pub mod build;
pub mod command;
pub mod draft;
pub mod gc;
pub mod key;
pub mod manifest;
mod pages;
pub mod size;
pub mod store;
#[cfg(test)]
mod tests;

pub use key::{Ingredients, Key, Scope};
pub use store::{Store, Template};

//! Pods that start as clones of a template: as good as those that boot, whatever happens to it.

mod identity;
mod many;
mod sabotage;
mod sharing;
mod sizes;
mod starts;

//! How large a template is, given the pods that start from it. A clone is given more memory and vCPUs than its
//! template has, in blocks and one by one, and never less: so one template serves nearly all sizes, and the usual pod,
//! which has the template's own, waits for nothing.

use crate::config::{Config, DEFAULT_MEMORY_MIB};

/// Memory is added in blocks of this size (machine.proto), MiB.
const BLOCK_MIB: u64 = 128;
/// vCPUs that any clone may have. Each possible one costs every clone some 100 KiB of memory.
const POSSIBLE_VCPUS: u32 = 8;

/// Of a template's machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Size {
    pub memory_mib: u64,
    /// That its clones may have; it has one itself.
    pub possible_vcpus: u32,
}

impl Size {
    /// Of the template that a pod starts from. The memory is the pod's, less whole blocks down to the default;
    /// the vCPUs are the usual ones, or as many as the pod has where that is more.
    pub fn for_pod(config: &Config) -> Self {
        let spare = config.memory_mib.saturating_sub(DEFAULT_MEMORY_MIB);
        Self {
            memory_mib: config.memory_mib - spare / BLOCK_MIB * BLOCK_MIB,
            possible_vcpus: config.vcpus.max(POSSIBLE_VCPUS),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::options::Options;

    #[test]
    fn one_template_serves_all_sizes_that_are_whole_blocks_apart() {
        for ((memory_mib, vcpus), (from, possible_vcpus)) in [
            ((256, 1), (256, 8)),
            ((384, 2), (256, 8)),
            ((2048, 8), (256, 8)),
            ((65536, 1), (256, 8)),
            // Less than the default, or not whole blocks more: a template of another size.
            ((64, 1), (64, 8)),
            ((254, 1), (254, 8)),
            ((382, 1), (382, 8)),
            ((1000, 1), (360, 8)),
            ((256, 9), (256, 9)),
            ((256, 64), (256, 64)),
        ] {
            let options = Options {
                config_body: format!("memory_mib = {memory_mib}\nvcpus = {vcpus}\n"),
                ..Options::default()
            };
            let config = Config::load(Path::new("/nowhere"), &options).unwrap();
            let size = Size {
                memory_mib: from,
                possible_vcpus,
            };
            assert_eq!(Size::for_pod(&config), size, "{memory_mib} MiB, {vcpus}");
        }
    }
}

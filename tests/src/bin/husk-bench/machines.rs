//! husk-vmm alone, without a shim: by Boot, and by Restore of the template that pods start from.

use std::{
    fs::{self, File},
    path::{Path, PathBuf},
    time::Instant,
};

use anyhow::{Context, Result};
use husk_tests::machine::{self, INITRD, KERNEL, Machine, Saved};

use crate::{
    MEMORY_MIB,
    host::kvm_exits,
    report::Measure,
    starts::{SAMPLES, milliseconds},
};

/// From the start of husk-vmm to the agent's answer.
#[derive(Default)]
struct Samples {
    answered: Vec<f64>,
    /// The call alone.
    restored: Vec<f64>,
    /// In the host's kernel and to user space alike.
    exits: Vec<f64>,
    /// Of the VMM's process, its guest included.
    faults: Vec<f64>,
}

/// What a template's directory holds.
struct Template {
    saved: Saved,
    pages: Option<File>,
}

impl Template {
    /// The only one in the store.
    fn only(store: &Path) -> Result<Self> {
        let visible = |path: &PathBuf| {
            let name = path.file_name().unwrap_or_default();
            !name.to_string_lossy().starts_with('.')
        };
        let directory = fs::read_dir(store)
            .with_context(|| format!("read {}", store.display()))?
            .flatten()
            .map(|entry| entry.path())
            .find(visible)
            .with_context(|| format!("no template in {}", store.display()))?;
        let open = |name: &str| {
            let path = directory.join(name);
            File::open(&path).with_context(|| format!("open {}", path.display()))
        };
        Ok(Template {
            saved: Saved {
                memory: open("memory")?,
                state: open("state")?,
            },
            pages: open("pages").ok(),
        })
    }
}

pub fn boots_and_clones(store: &Path) -> Result<Vec<Measure>> {
    let template = Template::only(store)?;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    let (mut boots, mut clones) = (Samples::default(), Samples::default());
    // The first round warms the page cache and is not counted.
    for round in 0..=SAMPLES {
        for (samples, template) in [(&mut boots, None), (&mut clones, Some(&template))] {
            if round == 0 {
                runtime.block_on(sample(template, &mut Samples::default()))?;
            } else {
                runtime.block_on(sample(template, samples))?;
            }
        }
    }
    Ok(vec![
        Measure::of_husk("vmm-boot", "ms", boots.answered),
        Measure::of_husk("exits-per-boot", "1", boots.exits),
        Measure::of_husk("vmm-clone", "ms", clones.answered),
        Measure::of_husk("vmm-restore", "ms", clones.restored),
        Measure::of_husk("exits-per-clone", "1", clones.exits),
        Measure::of_husk("faults-per-clone", "1", clones.faults),
    ])
}

async fn sample(template: Option<&Template>, samples: &mut Samples) -> Result<()> {
    let before = kvm_exits()?;
    let began = Instant::now();
    let mut machine = Machine::spawn()?;
    let agent = match template {
        Some(Template { saved, pages }) => {
            // The first answer of all waits until the process is up, which is no part of the call.
            machine.status().await?;
            let call = Instant::now();
            let agent = machine.restore(saved, pages.as_ref()).await?;
            samples.restored.push(milliseconds(call));
            agent
        }
        None => {
            machine
                .boot(Path::new(KERNEL), Path::new(INITRD), MEMORY_MIB, 1, "")
                .await?
        }
    };
    let _client = machine::hello(agent).await?;
    samples.answered.push(milliseconds(began));
    samples.exits.push(kvm_exits()? - before);
    samples
        .faults
        .push(machine::page_faults(machine.pid())? as f64);
    Ok(())
}

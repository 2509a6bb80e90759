//! A split virtqueue whose rings and chains are the guest's. Whatever they are, a chain is whole and within guest
//! memory, or it is an error.

use arbitrary::{Arbitrary, Unstructured};
use husk_vmm::{
    memory::GuestRam,
    virtio::queue::{Chain, fill, split, total},
};

use crate::driver::{Deed, RAM, activation};

const SIZES: [u16; 3] = [128, 16, 128];
/// More buffers than any chain may have (`BUFFERS_MAX`), and one more for each that crosses a border.
const BUFFERS_MAX: usize = 2048;

#[derive(Arbitrary, Debug)]
struct Input {
    event_idx: bool,
    steps: Vec<Step>,
}

#[derive(Arbitrary, Debug)]
enum Step {
    Deed(u8, Deed),
    Pop(u8, Use),
    PopOrArm(u8, Use),
    PopAndUnpop(u8),
    Push(u8, u16, u32),
    Arm(u8),
    Disarm(u8),
    Signal(u8),
}

/// What a device does with a chain.
#[derive(Arbitrary, Debug)]
enum Use {
    Nothing,
    Header,
    Answer(u16),
    Split(u16),
}

pub(crate) fn run(data: &[u8]) {
    let Ok(input) = Input::arbitrary_take_rest(Unstructured::new(data)) else {
        return;
    };
    let activation = activation(&SIZES, input.event_idx);
    let (ram, mut queues) = (activation.ram, activation.queues);
    for step in input.steps {
        let index = |queue: u8| usize::from(queue % 3);
        // A device stops at the first error; a queue has to bear more than that.
        match step {
            Step::Deed(queue, deed) => deed.act(&ram, queue),
            Step::Pop(queue, how) => {
                let queue = &mut queues[index(queue)];
                if let Ok(Some(chain)) = queue.pop(&ram) {
                    let (head, written) = serve(&ram, chain, how);
                    let _ = queue.push(&ram, head, written);
                }
            }
            Step::PopOrArm(queue, how) => {
                if let Ok(Some(chain)) = queues[index(queue)].pop_or_arm(&ram) {
                    serve(&ram, chain, how);
                }
            }
            Step::PopAndUnpop(queue) => {
                let queue = &mut queues[index(queue)];
                let before = queue.state();
                if let Ok(Some(first)) = queue.pop(&ram) {
                    let head = first.head();
                    queue.unpop();
                    assert_eq!(queue.state().next_avail, before.next_avail);
                    let again = queue.pop(&ram).expect("popped before");
                    assert_eq!(again.map(|chain| chain.head()), Some(head));
                }
            }
            Step::Push(queue, head, written) => {
                let _ = queues[index(queue)].push(&ram, head, written as usize);
            }
            Step::Arm(queue) => drop(queues[index(queue)].arm(&ram)),
            Step::Disarm(queue) => drop(queues[index(queue)].disarm(&ram)),
            Step::Signal(queue) => drop(queues[index(queue)].signal(&ram)),
        }
    }
}

/// Uses a chain as devices do; returns its head and how much was written.
fn serve(ram: &GuestRam, mut chain: Chain<'_>, how: Use) -> (u16, usize) {
    let _ = ram;
    let buffers = chain.readable.len() + chain.writable.len();
    assert!(buffers <= BUFFERS_MAX, "{buffers} buffers");
    let (readable, writable) = (total(&chain.readable), total(&chain.writable));
    // Buffers may overlap, but none is larger than memory.
    let fits =
        |slices: &[vm_memory::VolatileSlice<'_>]| slices.iter().all(|s| s.len() as u64 <= RAM);
    assert!(fits(&chain.readable) && fits(&chain.writable));
    let written = match how {
        Use::Nothing => 0,
        Use::Header => {
            let header = chain.read_header::<44>();
            assert_eq!(header.is_ok(), readable >= 44);
            if header.is_ok() {
                assert_eq!(total(&chain.readable), readable - 44);
            }
            0
        }
        Use::Answer(length) => {
            let length = usize::from(length);
            match chain.take_writable(length) {
                Ok(target) => {
                    assert_eq!(total(&target), length);
                    assert_eq!(total(&chain.writable), writable - length);
                    fill(&target, &vec![0xa5; length]);
                    length
                }
                Err(_) => {
                    assert!(writable < length);
                    0
                }
            }
        }
        Use::Split(length) => {
            if let Ok((first, rest)) = split(&chain.readable, length.into()) {
                assert_eq!(total(&first) + total(&rest), readable);
            }
            0
        }
    };
    (chain.head(), written)
}

//! What a guest has from its host: the time, randomness, a name. A clone wakes up with those of its template, so
//! they come with the first call; the time goes on coming for as long as the VM lives.

use std::{
    io,
    os::fd::{AsRawFd, FromRawFd, OwnedFd},
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use husk_proto::{agent as api, agent_ttrpc::AgentClient};
use tokio::{
    io::{Interest, unix::AsyncFd},
    time::sleep,
};
use ttrpc::context;

use crate::ready;

/// Between two corrections. The guest's clock runs by the CPU's; where the host's is disciplined by NTP the two
/// drift apart by some 10 us a second.
const CORRECTION: Duration = Duration::from_secs(600);
/// After one that failed.
const RETRY: Duration = Duration::from_secs(30);
/// A guest that was running has answered by then; one that boots takes ten times as long.
const PROMPT: Duration = Duration::from_millis(10);
/// For the agent to answer.
const ANSWER: Duration = Duration::from_secs(10);

/// The first call to an agent.
pub fn hello() -> api::HelloRequest {
    let mut entropy = vec![0; 64];
    if let Err(e) = fill_randomly(&mut entropy) {
        log::error!("getrandom: {e}");
        // The agent refuses a guest without randomness of its own: better no clone than two that are alike.
        entropy.clear();
    }
    api::HelloRequest {
        wall_clock_ns: wall_clock_ns(),
        entropy,
        hostname: hostname(),
        ..api::HelloRequest::default()
    }
}

/// Says hello. An agent that was still on its way when it was sent has taken the time for what it was then,
/// and is told again, before anybody can look.
pub async fn greet(agent: &AgentClient) -> ttrpc::Result<api::HelloResponse> {
    let asked = Instant::now();
    let answer = agent.hello(context::Context::default(), &hello()).await?;
    if asked.elapsed() > PROMPT {
        let request = api::SetClockRequest {
            wall_clock_ns: wall_clock_ns(),
            at_once: true,
            ..api::SetClockRequest::default()
        };
        agent
            .set_clock(context::Context::default(), &request)
            .await?;
    }
    Ok(answer)
}

/// Keeps the guest's wall clock with the host's, also when somebody sets that; to be dropped with the VM.
/// `steps` was watched since before the guest was last told the time.
pub async fn lead_clock(agent: AgentClient, steps: Option<ClockSteps>) {
    lead(agent, steps, CORRECTION, RETRY).await;
}

async fn lead(
    agent: AgentClient,
    mut steps: Option<ClockSteps>,
    correction: Duration,
    retry: Duration,
) {
    let mut pause = correction;
    loop {
        let set = async {
            if let Some(steps) = &steps {
                match steps.next().await {
                    Ok(()) => return,
                    Err(e) => log::warn!("watch the clock: {e}"),
                }
            }
            std::future::pending().await
        };
        tokio::select! {
            () = set => {}
            () = sleep(pause) => {}
        }
        // Before the time is read, or a step that comes until the guest has it would be missed.
        steps = ClockSteps::watch();
        let request = api::SetClockRequest {
            wall_clock_ns: wall_clock_ns(),
            ..api::SetClockRequest::default()
        };
        let set = agent
            .set_clock(context::with_duration(ANSWER), &request)
            .await;
        pause = match set {
            Ok(_) => correction,
            // A guest too busy to answer is one whose clock is wrong for longer.
            Err(e) => {
                log::warn!("set the guest's clock: {e}; trying again in {retry:?}");
                retry
            }
        };
    }
}

/// A number that nobody in the guest can guess, never 0: who knows a stream's could answer for it.
pub fn stream_id() -> io::Result<u64> {
    let mut bytes = [0; 8];
    fill_randomly(&mut bytes)?;
    Ok(u64::from_ne_bytes(bytes).max(1))
}

/// At most 256 bytes, which come whole (getrandom(2)).
fn fill_randomly(bytes: &mut [u8]) -> io::Result<()> {
    // SAFETY: the buffer has that many bytes.
    let got = unsafe { libc::getrandom(bytes.as_mut_ptr().cast(), bytes.len(), 0) };
    match usize::try_from(got) {
        Ok(got) if got == bytes.len() => Ok(()),
        Ok(got) => Err(io::Error::other(format!("{got} bytes of {}", bytes.len()))),
        Err(_) => Err(io::Error::last_os_error()),
    }
}

/// Knows of the first step of the host's wall clock since it was made (timerfd_create(2),
/// TFD_TIMER_CANCEL_ON_SET).
pub struct ClockSteps(AsyncFd<OwnedFd>);

impl ClockSteps {
    /// None, which the log explains, if the kernel does not have it.
    pub fn watch() -> Option<Self> {
        match Self::armed() {
            Ok(steps) => Some(steps),
            Err(e) => {
                log::warn!("watch the clock: {e}");
                None
            }
        }
    }

    fn armed() -> io::Result<Self> {
        let flags = libc::TFD_NONBLOCK | libc::TFD_CLOEXEC;
        // SAFETY: no pointers.
        let fd = unsafe { libc::timerfd_create(libc::CLOCK_REALTIME, flags) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the descriptor was just made, and is nobody's else.
        let timer = unsafe { OwnedFd::from_raw_fd(fd) };
        // SAFETY: an all-zero itimerspec is a valid value.
        let mut never: libc::itimerspec = unsafe { std::mem::zeroed() };
        never.it_value.tv_sec = libc::time_t::MAX;
        let flags = libc::TFD_TIMER_ABSTIME | libc::TFD_TIMER_CANCEL_ON_SET;
        // SAFETY: the structure lives across the call; no old value is asked for.
        let armed = unsafe {
            libc::timerfd_settime(timer.as_raw_fd(), flags, &never, std::ptr::null_mut())
        };
        if armed < 0 {
            return Err(io::Error::last_os_error());
        }
        ready::watch(timer, Interest::READABLE).map(Self)
    }

    /// Returns when the clock has been set, once or more.
    async fn next(&self) -> io::Result<()> {
        self.0.readable().await?.retain_ready();
        Ok(())
    }
}

fn wall_clock_ns() -> u64 {
    let now = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default();
    u64::try_from(now.as_nanos()).unwrap_or_default()
}

/// The host's, at most 64 bytes; empty if there is none.
fn hostname() -> String {
    let mut name = [0u8; 65];
    // SAFETY: one byte less than the buffer has, so that a zero follows whatever is written.
    if unsafe { libc::gethostname(name.as_mut_ptr().cast(), name.len() - 1) } < 0 {
        log::warn!("gethostname: {}", io::Error::last_os_error());
        return String::new();
    }
    let end = name.iter().position(|byte| *byte == 0).unwrap_or(0);
    // Not lossy: replacements are longer than what they replace, and the agent takes 64 bytes.
    String::from_utf8(name.get(..end).unwrap_or_default().to_vec()).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use async_trait::async_trait;
    use futures::{StreamExt, stream};
    use husk_proto::agent_ttrpc::{Agent, create_agent};
    use tokio::net::UnixStream;
    use ttrpc::{
        r#async::{
            Client, Server, TtrpcContext,
            transport::{Listener, Socket},
        },
        get_status,
    };

    use super::*;

    /// An agent that has other things to do.
    #[derive(Default)]
    struct Guest {
        boots: Duration,
        /// How often it does not manage to set its clock.
        fails: usize,
        /// The time of Hello, then that of each SetClock and whether it was to be set at once.
        told: Mutex<Vec<(u64, bool)>>,
    }

    #[async_trait]
    impl Agent for Guest {
        async fn hello(
            &self,
            _: &TtrpcContext,
            request: api::HelloRequest,
        ) -> ttrpc::Result<api::HelloResponse> {
            sleep(self.boots).await;
            let mut told = self.told.lock().unwrap();
            told.push((request.wall_clock_ns, true));
            Ok(api::HelloResponse::default())
        }

        async fn set_clock(
            &self,
            _: &TtrpcContext,
            request: api::SetClockRequest,
        ) -> ttrpc::Result<api::SetClockResponse> {
            let mut told = self.told.lock().unwrap();
            told.push((request.wall_clock_ns, request.at_once));
            if told.len() <= self.fails {
                let status = get_status(ttrpc::Code::INTERNAL, "busy");
                return Err(ttrpc::Error::RpcStatus(status));
            }
            Ok(api::SetClockResponse::default())
        }
    }

    /// The server ends with the value.
    async fn client_of(guest: &Arc<Guest>) -> (AgentClient, Server) {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let once = stream::iter([io::Result::Ok(theirs)]).chain(stream::pending());
        let mut server = Server::new()
            .add_listener(Listener::new(once))
            .register_service(create_agent(guest.clone()));
        server.start().await.unwrap();
        (AgentClient::new(Client::new(Socket::new(ours))), server)
    }

    #[tokio::test]
    async fn a_guest_that_boots_gets_the_time_of_when_it_is_there() {
        let boots = Duration::from_millis(300);
        let guest = Arc::new(Guest {
            boots,
            ..Guest::default()
        });
        let (agent, _server) = client_of(&guest).await;
        greet(&agent).await.unwrap();
        let now = wall_clock_ns();
        let told = guest.told.lock().unwrap();
        let (last, at_once) = *told.last().unwrap();
        assert!(told.len() == 2 && at_once, "{told:?}");
        let behind = Duration::from_nanos(now - last);
        assert!(behind < boots / 2, "{behind:?} behind");
    }

    #[tokio::test]
    async fn a_clock_that_could_not_be_set_is_set_later() {
        let guest = Arc::new(Guest {
            fails: 3,
            ..Guest::default()
        });
        let (agent, _server) = client_of(&guest).await;
        let short = Duration::from_millis(5);
        let leading = lead(agent, None, short, short);
        tokio::select! {
            () = leading => panic!("it ended"),
            () = async {
                while guest.told.lock().unwrap().len() < 6 {
                    sleep(short).await;
                }
            } => {}
            () = sleep(Duration::from_secs(30)) => panic!("{:?}", guest.told.lock().unwrap()),
        }
        assert!(
            guest
                .told
                .lock()
                .unwrap()
                .iter()
                .all(|(_, at_once)| !at_once)
        );
    }

    #[test]
    fn ids_of_streams_cannot_be_guessed() {
        let mut ids: Vec<u64> = (0..64).map(|_| stream_id().unwrap()).collect();
        // Not counted, not from a small range: each bit is set in some and not in others.
        assert_eq!(ids.iter().fold(0, |all, id| all | id), u64::MAX);
        assert_eq!(ids.iter().fold(u64::MAX, |all, id| all & id), 0);
        ids.sort_unstable();
        ids.dedup();
        assert_eq!(ids.len(), 64);
    }

    #[test]
    fn the_first_call_says_everything() {
        let (one, two) = (hello(), hello());
        assert_eq!(one.entropy.len(), 64);
        assert_ne!(one.entropy, two.entropy);
        assert!(one.wall_clock_ns > 1_700_000_000_000_000_000);
        let name = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap();
        assert_eq!(one.hostname, name.trim_end());
    }
}

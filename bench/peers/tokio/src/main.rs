// The four measures of bench/peers with tokio's current-thread runtime. Prints one
// `measure nanoseconds` a line. Joining all is a Vec of receivers awaited in order, which is what
// costs least here (join_all of the futures crate costs more).
use std::time::Instant;
use tokio::sync::oneshot;

const YIELDS: usize = 1_000_000;
const TASKS: usize = 500_000;
const INPUTS: usize = 300_000;
const CALLBACKS: usize = 500_000;

async fn yielder() {
    for _ in 0..YIELDS / 2 {
        tokio::task::yield_now().await;
    }
}

async fn switches() {
    let first = tokio::spawn(yielder());
    let second = tokio::spawn(yielder());
    first.await.unwrap();
    second.await.unwrap();
}

async fn spawn() {
    let mut n = 0;
    for _ in 0..TASKS {
        n = tokio::spawn(async move { n + 1 }).await.unwrap();
    }
    assert!(n == TASKS);
}

async fn all() {
    let (tickets, futures): (Vec<_>, Vec<_>) =
        (0..INPUTS).map(|_| oneshot::channel::<usize>()).unzip();
    let joined = tokio::spawn(async move {
        let mut results = Vec::with_capacity(INPUTS);
        for future in futures {
            results.push(future.await.unwrap());
        }
        results
    });
    tokio::task::yield_now().await;
    for (i, ticket) in tickets.into_iter().enumerate() {
        ticket.send(i).unwrap();
    }
    assert!(joined.await.unwrap().len() == INPUTS);
}

async fn one_shot() {
    for i in 0..CALLBACKS {
        let (ticket, future) = oneshot::channel::<usize>();
        ticket.send(i).unwrap();
        assert!(future.await.unwrap() == i);
    }
}

macro_rules! report {
    ($what:expr, $measure:ident, $count:expr) => {
        $measure().await;
        let start = Instant::now();
        $measure().await;
        println!("{} {:.1}", $what, start.elapsed().as_nanos() as f64 / $count as f64);
    };
}

fn main() {
    let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
    runtime.block_on(async {
        report!("switch", switches, YIELDS);
        report!("spawn", spawn, TASKS);
        report!("all", all, INPUTS);
        report!("oneshot", one_shot, CALLBACKS);
    });
}
